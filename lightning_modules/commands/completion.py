"""``trix completion``: a script that lets a shell complete commands, options and files."""

import argparse
import importlib
import sys
from collections.abc import Iterable

from lightning_modules.commands.arguments import FILE, TRUST, CommandParser
from lightning_modules.commands.table import COMMANDS
from lightning_modules.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")
FILE_OPTIONS = ("--config", "-c", "--ckpt_path", "--resume", "--data", "--model", "--trainer")


def run_completion(arguments: list[str]) -> int:
    """Print the script."""
    options = make_parser().parse_strictly(arguments)
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("completion needs the package shtab: pip install shtab") from error
    sys.stdout.write(shtab.complete(whole_parser(), shell=options.shell) + "\n")
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser: the light ones as they are, those of the training by their options."""
    parser = argparse.ArgumentParser(prog="trix")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command")
    for command in COMMANDS:
        module = importlib.import_module(command.module)
        if command.is_training:
            _add_options(commands.add_parser(command.name, help=command.summary), module.training_actions(command.name))
        else:
            commands.add_parser(command.name, parents=[module.make_parser()], add_help=False, help=command.summary)
    return parser


def _add_options(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> None:
    """The names, choices and help of options; what they take is left to the command itself."""
    for action in actions:
        names = [name for name in action.option_strings if name not in ("-h", "--help")]
        if not names or action.help == argparse.SUPPRESS:
            continue
        choices = list(action.choices) if action.choices else None
        # No percent signs: they would be taken for placeholders.
        added = parser.add_argument(*names, choices=choices, help=(action.help or "").replace("%", "%%"))
        if set(names) & set(FILE_OPTIONS):
            added.complete = FILE  # type: ignore[attr-defined]
    if parser.prog.endswith("fit"):
        parser.add_argument("--resume", help="go on from a run folder").complete = FILE  # type: ignore[attr-defined]
    parser.add_argument(TRUST, help="let the configuration name classes of this module of your own")


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix completion",
        description="Print a script that lets a shell complete commands, options and file names. It takes a few seconds to\n"
        "write: keep it in a file.",
        epilog="examples:\n"
        "  trix completion bash > ~/.local/share/bash-completion/completions/trix\n"
        "  trix completion zsh > ~/.zfunc/_trix    # ~/.zfunc must be in fpath, before compinit",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to read it")
    return parser
