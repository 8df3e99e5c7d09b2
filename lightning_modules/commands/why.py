"""``trix why``: for each token of a text or an image, the tile it went to, the runner-up, and what decided."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import load_task, make_labelled_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_text import print_rich
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lightning_modules.tasks import ClassifierTask, LanguageModelTask, RoutedTask
    from trix.introspection import Explanation

SHADES = " .:*#"
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
    task, checkpoint = load_task(options.ckpt, "why")
    from trix.introspection import TriXIntrospector

    try:
        inputs, tokens, subject = _example(task, checkpoint, options)
        positions = _positions(options, len(tokens))
        introspector = TriXIntrospector(task.network)
        explanations = introspector.why(inputs, options.layer, options.num_dims)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{options.ckpt}: {error}") from error
    num_layers = len(introspector.layers)
    others = f" (there are 0 to {num_layers - 1}; --layer chooses)" if num_layers > 1 else ""
    num_tiles = introspector.layers[options.layer].num_tiles
    header = f"{subject}, layer {options.layer}{others}, {num_tiles} tiles"
    _print(header, [explanations[position] for position in positions], tokens)
    return 0


def _example(task: "RoutedTask", checkpoint: dict[str, Any], options: Namespace) -> tuple["Tensor", list[str], str]:
    """What the network takes, how each of its tokens is written, and what it is."""
    from lightning_modules.tasks import ClassifierTask, LanguageModelTask

    if isinstance(task, LanguageModelTask):
        if options.prompt is None:
            raise UserError("a language model needs a text: --prompt TEXT")
        return _encoded(task, options.prompt), _written(options.prompt), "prompt"
    if isinstance(task, ClassifierTask) and task.vocabulary is not None:
        if options.prompt is None:
            raise UserError("a classifier of texts needs one: --prompt TEXT")
        return _classified(task, task.vocabulary, options.prompt)
    if isinstance(task, ClassifierTask):
        return _image(task, checkpoint, options)
    raise UserError(f"task ({task.task_name}) must be {LanguageModelTask.task_name} or {ClassifierTask.task_name}")


def _written(prompt: str) -> list[str]:
    return [repr(character) for character in prompt]


def _encoded(task: "LanguageModelTask", prompt: str) -> "Tensor":
    import torch

    _check_length(prompt, task.network.config.context_length)
    unknown = sorted(set(prompt) - set(task.vocabulary))
    if unknown:
        raise UserError(f"the prompt holds {', '.join(map(repr, unknown[:5]))}, outside the vocabulary of the model")
    return torch.tensor([[task.vocabulary.index(character) for character in prompt]])


def _classified(task: "ClassifierTask", vocabulary: str, prompt: str) -> tuple["Tensor", list[str], str]:
    import torch

    from lightning_modules.data.language_id import encode
    from lightning_modules.data.translations import plain_text

    prompt = plain_text(prompt)
    _check_length(prompt, task.network.config.context_length)
    token_BT = encode([prompt], vocabulary, len(prompt))
    prediction = int(task.predict_step((token_BT, torch.zeros(1, dtype=torch.int64)))["label"])
    return token_BT, _written(prompt), f"prompt, taken for {task.class_names[prediction]!r}"


def _check_length(prompt: str, limit: int) -> None:
    if not 1 <= len(prompt) <= limit:
        raise UserError(f"length of the prompt ({len(prompt)}) must be >= 1 and <= context_length ({limit})")


def _image(task: "ClassifierTask", checkpoint: dict[str, Any], options: Namespace) -> tuple["Tensor", list[str], str]:
    import torch

    if options.index is None:
        raise UserError("a classifier needs one of its validation images: --index N")
    batches = list(make_labelled_data(task, checkpoint, options.ckpt).val_dataloader())
    image_NTF, label_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if not 0 <= options.index < len(image_NTF):
        raise UserError(f"--index ({options.index}) must be >= 0 and < validation images ({len(image_NTF)})")
    image_BTF = image_NTF[options.index : options.index + 1]
    prediction = int(task.predict_step((image_BTF, label_N[:1]))["label"])
    names = task.class_names
    subject = f"image {options.index}: a {names[int(label_N[options.index])]}, taken for a {names[prediction]}"
    levels = (image_BTF[0].clamp(0, 1) * (len(SHADES) - 1)).round().to(torch.int64).tolist()
    return image_BTF, ["".join(SHADES[level] * 2 for level in row) for row in levels], subject


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
    parser.add_argument("--index", type=int, help="for a classifier of images: which of its validation images, counted from 0")
    parser.add_argument("--layer", type=int, default=0, help="the routed layer, counted from 0 (default: %(default)s)")
    parser.add_argument("--num-dims", type=int, default=5, help="how many dimensions to name (default: %(default)s)")
    parser.add_argument("--position", type=int, help="only the token at this place, counted from 0")
    parser.add_argument("--last", type=int, help="only the last so many tokens")
    return parser
