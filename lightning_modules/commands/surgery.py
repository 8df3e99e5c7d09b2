"""``trix surgery``: change one signature, or remove one tile, of a checkpoint or an exported model, into a new file."""

import copy
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import load_task
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.signature_values import is_signs, read_signature
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.tasks import TrixTask
    from trix.nn import RoutedLayer

ACTIONS = ("insert", "freeze", "unfreeze", "remove")


def run_surgery(arguments: list[str]) -> int:
    """Change the tile, write the new file, read it again, and print what has changed."""
    options = make_parser().parse_strictly(_with_signature_attached(arguments))
    ckpt, output = best_checkpoint(Path(options.model)), Path(options.output)
    _check_options(options, ckpt, output)
    if ckpt.suffix.lower() == ".onnx":
        from lightning_modules.commands.surgery_onnx import run_onnx_surgery

        return run_onnx_surgery(options, ckpt, output)
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        return _run_checkpoint_surgery(options, ckpt, output, trusted)


def _run_checkpoint_surgery(options: Namespace, ckpt: Path, output: Path, trusted: Collection[str]) -> int:
    task, checkpoint = load_task(str(ckpt), "surgery", trusted)
    from lightning_modules.commands.surgery_ngrams import design, print_forecast, print_measured
    from lightning_modules.whole_files import save

    try:
        copies = copies_of(task, checkpoint)
        layer = routed_layer(task, options.layer)
        before = layer.get_signature_analysis(options.tile)
        originals = {key: copy.deepcopy(of_copy.state_dict()) for key, of_copy in copies.items()}
        designed = None if options.ngrams is None else design(task, checkpoint, options, str(ckpt), trusted)
        for of_copy in copies.values():
            operate(routed_layer(of_copy, options.layer), options, None if designed is None else designed.signature_D)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{ckpt}: {error}") from error
    if designed is not None:
        print_forecast(designed)  # before anything is written
    edited = checkpoint | {key: state_of(copies[key], originals[key], checkpoint[key]) for key in copies}
    changed = {key: [name for name, v in edited[key].items() if v is not checkpoint[key][name]] for key in copies}
    try:
        with output_folder(output.parent), whole_file(output) as partial:
            save(edited, partial)
            check_written(partial, options, copies, checkpoint, changed, trusted)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    after = layer.get_signature_analysis(options.tile)
    num_equal = sum(len(checkpoint[key]) - len(names) for key, names in changed.items())
    print(f"edited  layer {options.layer}, tile {options.tile}: {options.action}, tag {options.tag!r}")
    print(f"before  {_described(before)}")
    print("after   removed" if options.action == "remove" else f"after   {_described(after)}")
    print(f"changed {', '.join(changed['state_dict'])}")
    if len(copies) > 1:
        print(f"also in {', '.join(list(copies)[1:])}: the trained weights, of which the others are an average")
    if designed is not None:
        print_measured(task, designed, options.layer)
    print(f"wrote   {output}  (read again: the edit stands, the other {num_equal} weights and buffers are equal)")
    return 0


def routed_layer(task: "TrixTask", index: int) -> "RoutedLayer":
    """Raises ValueError where there is no such layer."""
    from trix.nn import routed_layers

    layers = routed_layers(task.network)
    if not layers:
        raise ValueError("number of routed layers in the model (0) must be >= 1")
    if not 0 <= index < len(layers):
        raise ValueError(f"layer ({index}) must be >= 0 and < number of routed layers ({len(layers)})")
    return layers[index]


def operate(layer: "RoutedLayer", options: Namespace, signature_D: "Tensor | None" = None) -> None:
    """Carry out the action; the layer writes it to its surgery history.

    Args:
        signature_D: what is inserted; None for what the options say.

    Raises:
        ValueError: what the layer says; or a tile is frozen that is frozen, or the other way round.
    """
    if options.action == "insert":
        import torch

        if signature_D is None:
            signature_D = torch.tensor(read_signature(options.signature, layer.router.d_model))
        layer.insert_signature(options.tile, signature_D, freeze=not options.no_freeze, tag=options.tag)
        return
    if options.action == "remove":
        layer.remove_tile(options.tile, tag=options.tag)
        return
    is_to_freeze = options.action == "freeze"
    if layer.is_frozen(options.tile) == is_to_freeze:
        state = "frozen already" if is_to_freeze else "not frozen"
        raise ValueError(f"nothing to {options.action}: tile ({options.tile}) of layer ({options.layer}) is {state}")
    act = layer.freeze_signature if is_to_freeze else layer.unfreeze_signature
    act(options.tile, tag=options.tag)


def copies_of(task: "TrixTask", checkpoint: dict[str, Any]) -> dict[str, "TrixTask"]:
    """By where they stand in the checkpoint: the task, and a copy of it with each further copy of the weights.

    Raises:
        ValueError: weights that do not fit the task.
    """
    from lightning_modules.tasks.checkpoint import load_weights
    from lightning_modules.tasks.upgrade import COPIES

    copies = {COPIES[0]: task}
    for key in COPIES[1:]:
        if key in checkpoint:
            copies[key] = copy.deepcopy(task)
            load_weights(copies[key], checkpoint[key])
    return copies


def state_of(task: "TrixTask", original: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The stored weights with those tensors of the task that differ from the original ones, in the floats of the training; all
    else are the stored objects.
    """
    import torch

    state = copy.copy(stored)  # not .copy(), which would leave out torch's notes on the modules' versions
    for name, value in task.state_dict().items():
        if not is_equal(value, original[name]):
            state[name] = value.to(stored[name].dtype) if isinstance(value, torch.Tensor) else value
    return state


def check_written(
    partial: Path,
    options: Namespace,
    copies: dict[str, "TrixTask"],
    checkpoint: dict[str, Any],
    changed: dict[str, list[str]],
    trusted: Collection[str],
) -> None:
    """Read the new file before it gets its name: the edit must stand in it, and all else must be what the checkpoint holds.

    Raises:
        RuntimeError: they do not.
    """
    from lightning_modules.tasks import CheckpointError, load_checkpoint

    try:
        task, written = load_checkpoint(partial, trusted)
        found = copies_of(task, written)
    except CheckpointError as error:
        raise RuntimeError(f"all must stand in the new checkpoint; no file is written: {error}") from error
    layers = ((routed_layer(of[key], options.layer) for of in (found, copies)) for key in copies)
    has_edit = all(is_equal(one.state_dict(), other.state_dict()) for one, other in layers)
    old, new = (content | {key: dict(content[key]) for key in changed} for content in (checkpoint, written))
    for key, names in changed.items():
        for name in names:
            del old[key][name], new[key][name]
    if not has_edit or not is_equal(old, new):
        what = "the old one's content" if has_edit else "the edit"
        raise RuntimeError(f"{what} must stand in the new checkpoint {options.output}, and does not; no file is written")


def is_equal(one: Any, other: Any) -> bool:
    """The same types and values all the way down; NaN equals NaN, for an optimizer may hold it."""
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, dict):
        return is_equal(list(one), list(other)) and is_equal(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other) or (one != one and other != other)


def _bytes(tensor: "Tensor") -> "Tensor":
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _described(analysis: dict[str, Any]) -> str:
    counts = f"{len(analysis['positive_dims'])} +, {len(analysis['negative_dims'])} -, {analysis['zero_count']} zeros"
    return f"{counts}, {'frozen' if analysis['frozen'] else 'not frozen'}"


def _with_signature_attached(arguments: list[str]) -> list[str]:
    """A signature or an n-gram may begin with "-", which would be taken for an option."""
    joined: list[str] = []
    for argument in arguments:
        option = joined[-1] if joined else ""
        is_option = argument.startswith("--") and argument[2:3].isalpha()
        if (option == "--signature" and argument and is_signs(argument)) or (option == "--ngrams" and not is_option):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _check_options(options: Namespace, ckpt: Path, output: Path) -> None:
    given = {"--signature": options.signature, "--ngrams": options.ngrams, "--no-freeze": options.no_freeze or None}
    named = [name for name, value in given.items() if value is not None]
    if options.action != "insert" and named:
        raise UserError(f"{named[0]} belongs to insert, not to {options.action}")
    if named[:2] == ["--signature", "--ngrams"]:
        raise UserError("--signature and --ngrams cannot both be given")
    if options.action == "insert" and not options.signature and options.ngrams is None:
        raise UserError("insert needs a signature: --signature SIGNS, --signature FILE.json or --ngrams TEXT,TEXT")
    if options.tag is None and options.ngrams is None:
        raise UserError("the following arguments are required: --tag; see `trix surgery --help`")
    options.tag = options.ngrams if options.tag is None else options.tag
    check_output_file(output, ckpt, kept=())  # below it replaces nothing at all
    is_exported = ckpt.suffix.lower() == ".onnx"  # the ending tells the two kinds of file apart
    if (output.suffix.lower() == ".onnx") != is_exported:
        raise UserError(f"output {output} must {'end' if is_exported else 'not end'} with .onnx: so do exported models alone")
    if output.exists():
        raise UserError(f"output {output} must not exist yet: no file is replaced")


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix surgery",
        description="Change one signature, or remove one tile, of a checkpoint or of an exported model, and write a new file.\n"
        "From a new checkpoint training can go on: all else in it, the optimizer's memory too, is as it was. An exported\n"
        "model is edited without torch. The change stands in the layer's surgery history, and the new file is verified.",
        epilog="examples:\n"
        "  trix surgery runs/digits insert --layer 1 --tile 3 --signature loop.json --tag loops --output new.ckpt\n"
        '  trix surgery runs/char_lm insert --ngrams "th,Th" --layer 0 --tile 3 --output new.ckpt\n'
        "  trix surgery runs/digits freeze --layer 0 --tile 2 --tag keep --output new.ckpt\n"
        "  trix surgery runs/digits/model.onnx remove --layer 0 --tile 5 --tag off --output new.onnx",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{CHECKPOINT_HELP}, or a file written by `trix export`").complete = FILE
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="insert: give the tile a signature and hold it; freeze: hold the present one; unfreeze: let it learn again; "
        "remove: let no token go to the tile",
    )
    parser.add_argument("--layer", type=int, required=True, help="the routed layer, counted from 0")
    parser.add_argument("--tile", type=int, required=True, help="the tile, counted from 0")
    parser.add_argument(
        "--signature",
        help='one sign a dimension, as in "+0-", or a JSON file: a list of -1, 0 and 1, or {"positive_dims": [...], '
        '"negative_dims": [...]}',
    ).complete = FILE
    parser.add_argument(
        "--ngrams",
        metavar="TEXT,TEXT",
        help="in a checkpoint that routes on context, instead of a signature: n-grams for which one is designed. What it "
        "will claim is said before it is inserted, and measured afterwards",
    )
    parser.add_argument("--no-freeze", action="store_true", help="let learning go on from the inserted signature")
    parser.add_argument("--tag", help="a name for the surgery history; where n-grams are given, these by default")
    parser.add_argument("--output", required=True, help="the file to write, which does not exist yet").complete = FILE
    parser.add_trust()
    return parser
