"""What the user got wrong, in one clear line: the rule and both values."""


class UserError(Exception):
    """An error the user can mend: the command line prints its text without a traceback and exits with code 2."""


class DataError(UserError, ValueError):
    """The data or its settings cannot be used: a file is missing, a text too short, a size out of range."""
