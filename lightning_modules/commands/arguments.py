"""The argument parser of the light commands: strict, with errors in one line."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError

CHECKPOINT_HELP = "a checkpoint written by `trix fit`, or a run folder: its newest best.ckpt"
# What `trix completion` offers for an argument; shtab reads it from an action's attribute `complete`.
FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
TRUST = "--trust"


class CommandParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors that name the nearest option."""

    def __init__(self, **settings: Any) -> None:
        self._known_options: list[str] = []  # before argparse adds --help, while it is being made
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: str, **settings: Any) -> Any:  # an action, to which `complete` can be added
        action = super().add_argument(*names, **settings)
        self._known_options.extend(action.option_strings)
        return action

    def add_trust(self) -> None:
        """The option of a command that reads checkpoints."""
        self.add_argument(
            TRUST,
            metavar="MODULE",
            action="append",
            default=[],
            help="let the checkpoint name a task, data or parts of a network from this module, which is then imported, also "
            "from the working folder; may be given several times, and TRIX_TRUST=MODULE,MODULE does the same",
        )

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        # Before argparse looks: it would first miss the required option that was misspelt.
        for argument in arguments:
            name = argument.split("=")[0]
            if name.startswith("--") and name not in ("--", *self._known_options):
                raise UserError(f"unknown option {name} of `{self.prog}`{did_you_mean(name, self._known_options)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def take_out(option: str, arguments: Sequence[str], needs: str) -> tuple[list[str], list[str]]:
    """The values of an option that is no parser's, in order, and the arguments without it.

    Args:
        needs: what the error says that the option needs.

    Raises:
        UserError: the option without a value.
    """
    values: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name != option:
            rest.append(argument)
            continue
        values.append(value if has_value else next(remaining, ""))
        if not values[-1] or values[-1].startswith("--"):
            raise UserError(f"{option} needs {needs}")
    return values, rest
