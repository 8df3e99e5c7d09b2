"""Ranges of settings that the DataModules share."""

from lightning_modules.errors import DataError


def check_at_least(minimum: int, **values: int) -> None:
    """Raise DataError for the first named value that is below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise DataError(f"{name} ({value}) must be >= {minimum}")


def check_fraction(**values: float) -> None:
    """Raise DataError for the first named value that is not strictly between 0 and 1."""
    for name, value in values.items():
        if not 0.0 < value < 1.0:
            raise DataError(f"{name} ({value}) must be in (0, 1)")
