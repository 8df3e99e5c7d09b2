"""``trix why``: for each token of a text, an image or the like, the tile it went to, the runner-up, and what decided."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_text import print_rich
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lightning_modules.tasks import TrixTask
    from trix.introspection import Explanation

LEGEND = """\
tile        where the token went, best first; the runner-up is the best tile that it did not go to
score       how well the token agrees with the tile's signature, with the tile's balance bias; the highest wins
bias        how much of the difference of the two scores is balance bias, which training keeps to spread the load
"""
OF_DIMENSIONS = """\
decided by  dimension:how much, for the dimensions that spoke most for the winner over the runner-up; over all dimensions,
            with the bias, they sum to the difference of the scores"""
OF_NGRAMS = """\
read        all that the choice depends on: the token with those before it, fewer at the beginning of the text
decided by  token@place:how much it spoke for the winner over the runner-up, at place 0 the token itself, at -1 the one before
            it; over all tokens read, with the bias, they sum to the difference of the scores"""


class Row(NamedTuple):
    """explanation: why one token went where it did. read: the n-gram that was read, or "". decided: what spoke for the tile."""

    explanation: "Explanation"
    read: str
    decided: str


def run_why(arguments: list[str]) -> int:
    """Print the table."""
    options = make_parser().parse_strictly(arguments)
    _check_options(options)
    options.ckpt = str(best_checkpoint(Path(options.ckpt)))
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        header, rows, tokens = _explained(options, trusted)
    _print(header, rows, tokens)
    return 0


def _explained(options: Namespace, trusted: Collection[str]) -> tuple[str, list[Row], list[str]]:
    """What stands above the table, its rows, and how all tokens are written."""
    task, checkpoint = load_task(options.ckpt, "why", trusted)
    from lightning_modules.tasks import Request
    from trix.introspection import TriXIntrospector

    try:
        introspector = TriXIntrospector(task.network)
        data = run_data(task, checkpoint, options.ckpt, trusted)
        inputs, tokens, subject = task.example(data, Request(options.prompt, options.index))
        positions = _positions(options, len(tokens))
        explanations = introspector.why(inputs, options.layer, options.num_dims)
        reasons = _reasons(task, inputs, explanations, tokens, options)
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
    return header, [Row(explanations[position], *reasons[position]) for position in positions], tokens


def _reasons(
    task: "TrixTask", inputs: "Tensor", explanations: Sequence["Explanation"], tokens: Sequence[str], options: Namespace
) -> list[tuple[str, str]]:
    """For each token the n-gram that was read, and what decided: of that, or of dimensions where no n-grams are read."""
    from trix.introspection.ngrams import routes_on_context

    if routes_on_context(task.network) and not inputs.is_floating_point() and inputs.shape == (1, len(tokens)):
        return _of_ngrams(task.network, inputs, explanations, tokens, options)
    pairs = (zip(e.decisive_dims, e.contributions, strict=True) for e in explanations)
    return [("", "  ".join(f"{dim}:{much:+.2f}" for dim, much in of_token)) for of_token in pairs]


def _of_ngrams(
    network: Any, token_BT: "Tensor", explanations: Sequence["Explanation"], tokens: Sequence[str], options: Namespace
) -> list[tuple[str, str]]:
    import torch

    from trix.introspection.ngrams import NgramReader, ngrams_at

    reader = NgramReader(network)
    winner_T = torch.tensor([e.tile_idx for e in explanations])
    rival_T = torch.tensor([max(e.runner_up_idx, 0) for e in explanations])  # without a runner-up nothing is shown
    part_TJ = reader.contributions(ngrams_at(token_BT, reader.num_tokens), winner_T, rival_T, options.layer)
    reasons = []
    for last, part_J in enumerate(part_TJ.tolist()):
        spoken = [(part, last - back) for back, part in enumerate(reversed(part_J)) if back <= last]
        read = "".join(_unquoted(tokens[place]) for _, place in reversed(spoken))
        strongest = sorted(spoken, key=lambda pair: -abs(pair[0]))[: options.num_dims]
        decided = "  ".join(f"{tokens[place]}@{place - last}:{part:+.2f}" for part, place in strongest)
        reasons.append((f"'{read}'", decided))
    return reasons


def _unquoted(token: str) -> str:
    return token[1:-1] if len(token) > 2 and token[0] == token[-1] and token[0] in "'\"" else token


def _positions(options: Namespace, num_tokens: int) -> Sequence[int]:
    if options.position is not None:
        if not 0 <= options.position < num_tokens:
            raise UserError(f"--position ({options.position}) must be >= 0 and < tokens ({num_tokens})")
        return [options.position]
    return range(num_tokens)[-(options.last or num_tokens) :]


def _print(header: str, rows: Sequence[Row], tokens: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    reads_ngrams = any(row.read for row in rows)
    read = ("read",) if reads_ngrams else ()
    for name in ("at", "token", "tile", "score", "runner-up", "score", "bias", *read, "decided by"):
        is_number = name in ("at", "tile", "score", "runner-up", "bias")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "decided by")
    for e, of_context, decided in rows:
        is_alone = e.runner_up_idx < 0
        rival = (
            ("-", "-", "-")
            if is_alone
            else (f"{e.runner_up_idx}", f"{e.runner_up_score:.2f}", f"{e.bias - e.runner_up_bias:+.2f}")
        )
        chosen = " ".join(map(str, e.chosen or [e.tile_idx]))
        why = (*([of_context] if reads_ngrams else []), "-" if is_alone else decided)
        cells = (f"{e.token_idx}", tokens[e.token_idx], chosen, f"{e.score:.2f}", *rival, *why)
        table.add_row(*map(Text, cells))
    legend = LEGEND + (OF_NGRAMS if reads_ngrams else OF_DIMENSIONS)

    def draw(console: "Console") -> None:
        console.print(Text(header), soft_wrap=True)
        console.print(table, "")
        console.print(Text(legend), soft_wrap=True)

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
        description="Print, for each token, the tile it went to, the runner-up, their scores, and what decided: dimensions,\n"
        "or, in a model that routes on context, the tokens that were read.",
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
    parser.add_argument(
        "--num-dims", type=int, default=5, help="how many dimensions, or tokens of an n-gram, to name (default: %(default)s)"
    )
    parser.add_argument("--position", type=int, help="only the token at this place, counted from 0")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N tokens")
    parser.add_trust()
    return parser
