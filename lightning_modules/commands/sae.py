"""``trix sae``: judge and read trained sparse autoencoders. Each action has a module of its own."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from lightning_modules.commands.arguments import CommandParser
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError


class Action(NamedTuple):
    """An action. Its module ``sae_NAME`` has ``make_parser()`` and ``run(options) -> exit code``.

    ``options.command`` holds the words of the whole command, as they were given.
    """

    name: str
    summary: str

    @property
    def module(self) -> Any:
        return import_module(f"lightning_modules.commands.sae_{self.name}")


ACTIONS: tuple[Action, ...] = (
    Action("eval", "measure an autoencoder beside controls that were trained like it"),
    Action("dashboard", "write one HTML page about what each latent stands for"),
    Action("tiles", "say which latents go with which tiles of the model, and which of them decide"),
    Action("planted", "train an architecture and its controls on features that are known, and count what they recover"),
)


def run_sae(arguments: list[str]) -> int:
    """Run the action that comes first."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(make_parser().format_help(), end="")
        return 0
    action = next((action for action in ACTIONS if action.name == name), None)
    if action is None:
        known = ", ".join(action.name for action in ACTIONS)
        hint = did_you_mean(name, [action.name for action in ACTIONS]) or "; see `trix sae --help`"
        raise UserError(f"action ({name}) of `trix sae` must be one of {known}{hint}")
    parser: CommandParser = action.module.make_parser()
    run: Callable[..., int] = action.module.run
    options = parser.parse_strictly(arguments[1:])
    options.command = ["trix", "sae", *arguments]
    return run(options)


def make_parser() -> CommandParser:
    """The parser of all actions, for help and completion; :func:`run_sae` uses theirs, whose errors name the action."""
    parser = CommandParser(
        prog="trix sae",
        description="Read, judge and use sparse autoencoders that `trix fit --config configs/sae.yaml` has trained.",
        epilog="`trix sae ACTION --help` lists the options of an action.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in ACTIONS:
        actions.add_parser(action.name, parents=[action.module.make_parser()], add_help=False, help=action.summary)
    return parser
