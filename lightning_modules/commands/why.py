"""``trix why``: for each token of a text, an image or the like, the tile it went to, the runner-up, and what decided."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_text import print_rich
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched

if TYPE_CHECKING:
    from rich.console import Console

    from trix.introspection import Explanation

LEGEND = """\
tile        where the token went, best first; the runner-up is the best tile that it did not go to
score       how well the token agrees with the tile's signature, with the tile's balance bias; the highest wins
bias        how much of the difference of the two scores is balance bias, which training keeps to spread the load
decided by  dimension:how much, for the dimensions that spoke most for the winner over the runner-up; over all dimensions,
            with the bias, they sum to the difference of the scores"""


def run_why(arguments: list[str]) -> int:
    """Print the table."""
    options = make_parser().parse_strictly(arguments)
    _check_options(options)
    options.ckpt = str(best_checkpoint(Path(options.ckpt)))
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        header, explanations, tokens = _explained(options, trusted)
    _print(header, explanations, tokens)
    return 0


def _explained(options: Namespace, trusted: Collection[str]) -> tuple[str, list["Explanation"], list[str]]:
    """What stands above the table, an explanation for each of its rows, and how all tokens are written."""
    task, checkpoint = load_task(options.ckpt, "why", trusted)
    from lightning_modules.tasks import Request
    from trix.introspection import TriXIntrospector

    try:
        introspector = TriXIntrospector(task.network)
        data = run_data(task, checkpoint, options.ckpt, trusted)
        inputs, tokens, subject = task.example(data, Request(options.prompt, options.index))
        positions = _positions(options, len(tokens))
        explanations = introspector.why(inputs, options.layer, options.num_dims)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{options.ckpt}: {error}") from error
    if len(explanations) != len(tokens):
        raise UserError(f"tokens of the task's example ({len(tokens)}) must be those of the layer ({len(explanations)})")
    num_layers = len(introspector.layers)
    others = f" (there are 0 to {num_layers - 1}; --layer chooses)" if num_layers > 1 else ""
    num_tiles = introspector.layers[options.layer].num_tiles
    header = f"{subject}, layer {options.layer}{others}, {num_tiles} tiles"
    return header, [explanations[position] for position in positions], tokens


def _positions(options: Namespace, num_tokens: int) -> Sequence[int]:
    if options.position is not None:
        if not 0 <= options.position < num_tokens:
            raise UserError(f"--position ({options.position}) must be >= 0 and < tokens ({num_tokens})")
        return [options.position]
    return range(num_tokens)[-(options.last or num_tokens) :]


def _print(header: str, explanations: Sequence["Explanation"], tokens: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("at", "token", "tile", "score", "runner-up", "score", "bias", "decided by"):
        is_number = name in ("at", "tile", "score", "runner-up", "bias")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "decided by")
    for e in explanations:
        is_alone = e.runner_up_idx < 0
        decided = "  ".join(f"{d}:{c:+.2f}" for d, c in zip(e.decisive_dims, e.contributions, strict=True))
        rival = (
            ("-", "-", "-", "-")
            if is_alone
            else (f"{e.runner_up_idx}", f"{e.runner_up_score:.2f}", f"{e.bias - e.runner_up_bias:+.2f}", decided)
        )
        chosen = " ".join(map(str, e.chosen or [e.tile_idx]))
        cells = (f"{e.token_idx}", tokens[e.token_idx], chosen, f"{e.score:.2f}", *rival)
        table.add_row(*map(Text, cells))

    def draw(console: "Console") -> None:
        console.print(Text(header), soft_wrap=True)
        console.print(table, "")
        console.print(Text(LEGEND), soft_wrap=True)

    print_rich(draw)


def _check_options(options: Namespace) -> None:
    for one, other in (("prompt", "index"), ("position", "last")):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise UserError(f"--{one} and --{other} cannot both be given")
    if options.num_dims < 1:
        raise UserError(f"--num-dims ({options.num_dims}) must be >= 1")
    if options.last is not None and options.last < 1:
        raise UserError(f"--last ({options.last}) must be >= 1")


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix why",
        description="Print, for each token, the tile it went to, the runner-up, their scores, and the dimensions that decided.",
        epilog='examples:\n  trix why runs/char_lm --prompt "The " --layer 2\n  trix why runs/digits --index 7',
    )
    parser.add_argument("ckpt", metavar="CKPT", help=CHECKPOINT_HELP).complete = FILE
    parser.add_argument("--prompt", help="for a model of text: the text to ask about")
    parser.add_argument(
        "--index",
        type=int,
        help="for a classifier of images: which of its validation images, counted from 0; for other data: which example",
    )
    parser.add_argument("--layer", type=int, default=0, help="the routed layer, counted from 0 (default: %(default)s)")
    parser.add_argument("--num-dims", type=int, default=5, help="how many dimensions to name (default: %(default)s)")
    parser.add_argument("--position", type=int, help="only the token at this place, counted from 0")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N tokens")
    parser.add_trust()
    return parser
