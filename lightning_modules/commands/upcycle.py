"""``trix upcycle``: the feed-forward layers of a trained language model, cut into routed tiles, as a new checkpoint."""

import json
import shlex
from argparse import Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import whole_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.data import RunData
    from lightning_modules.tasks import LanguageModelTask
    from trix.nn import FFNConfig


def run_upcycle(arguments: list[str]) -> int:
    """Cut the layers, measure the result and its controls, write the new file, read it again, and print what came out."""
    options = make_parser().parse_strictly(arguments)
    ckpt, output = best_checkpoint(Path(options.ckpt)), Path(options.output)
    _check_options(options, ckpt, output)
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        return _upcycle(options, ckpt, output, trusted)


def _upcycle(options: Namespace, ckpt: Path, output: Path, trusted: Collection[str]) -> int:
    task, checkpoint = load_task(str(ckpt), "upcycle", trusted)
    from lightning_modules.tasks import LanguageModelTask
    from lightning_modules.upcycled_checkpoint import upcycled_checkpoint
    from lightning_modules.upcycling_report import measure_upcycling
    from lightning_modules.whole_files import save
    from trix.upcycling import check_upcycling, upcycle

    if type(task) is not LanguageModelTask:
        raise UserError(f"{ckpt}: task ({type(task).__name__}) must be LanguageModelTask")
    try:
        check_upcycling(task.network, options.tiles, options.top_k)
        text_BT, held_out = _texts(task, run_data(task, checkpoint, ckpt, trusted), options)
        settings = {"seed": options.seed, "freeze": options.freeze}
        upcycled = upcycle(task.network, text_BT, options.tiles, options.top_k, **settings)
        made, new = upcycled_checkpoint(task, checkpoint, upcycled)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{ckpt}: {error}") from error
    report = measure_upcycling(task.network, upcycled, text_BT, *held_out, seed=options.seed)
    try:
        with output_folder(output.parent), whole_file(output) as partial:
            save(new, partial)
            _check_written(partial, output, made, new, trusted)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    if options.report is not None:
        try:
            write_whole((json.dumps({"checkpoint": str(ckpt)} | report.record(), indent=1) + "\n").encode(), options.report)
        except OSError as error:
            rule = f"report {options.report} cannot be written: {error.strerror or error}"
            raise UserError(f"{rule}; the checkpoint {output} is there") from error
    print(report)
    print(f"wrote   {output}  (read back and verified)")
    print(f"go on   {_command_to_go_on(ckpt, output, checkpoint, task.network.config.ffn, made.network.config.ffn)}")
    return 0


def _texts(task: "LanguageModelTask", data: "RunData", options: Namespace) -> "tuple[Tensor, tuple[Tensor, Tensor]]":
    """Training text to group and fit on, [B, T], and held-out text with its next tokens, [B, T] each."""
    import torch

    from lightning_modules.tasks.token_ids import check_token_ids

    limit = task.network.config.context_length
    held_out_BT, target_BT = data.held_out(options.held_out_tokens)
    if target_BT is None or target_BT.shape != held_out_BT.shape:
        raise UserError("the data must give (tokens, next tokens): the loss on held-out text is measured")
    documents = torch.cat(list(data.training_documents(options.text_tokens)))
    text_BT = documents[: max(options.text_tokens // documents.shape[1], 1)]
    return check_token_ids(text_BT, task.vocabulary, limit), (check_token_ids(held_out_BT, task.vocabulary, limit), target_BT)


def _check_written(
    partial: Path, output: Path, made: "LanguageModelTask", new: dict[str, Any], trusted: Collection[str]
) -> None:
    """Read the new file before it gets its name.

    Raises:
        RuntimeError: something does not stand in it.
    """
    from lightning_modules.commands.surgery import is_equal
    from lightning_modules.tasks import load_checkpoint

    task, written = load_checkpoint(partial, trusted)
    if not is_equal(written, new) or not is_equal(task.state_dict(), made.state_dict()):
        raise RuntimeError(f"new checkpoint {output} must read back as it was written, and does not; no file is kept")


def _command_to_go_on(ckpt: Path, output: Path, checkpoint: dict[str, Any], old: "FFNConfig", new: "FFNConfig") -> str:
    """The `trix fit` that goes on from the file: the run's own configuration, and what the new layers have else."""
    from lightning_modules.resume import CONFIG_NAME, log_folder

    folder = log_folder(ckpt, checkpoint)
    config = "CONFIG_OF_THE_RUN" if folder is None else shlex.quote(str(folder / CONFIG_NAME))
    changed = {
        field.name: getattr(new, field.name) for field in fields(new) if getattr(new, field.name) != getattr(old, field.name)
    }
    settings = "".join(f" --model.network.ffn.{name} {shlex.quote(_as_yaml(value))}" for name, value in changed.items())
    return f"trix fit --resume {shlex.quote(str(output))} --config {config}{settings} --trainer.max_steps STEPS"


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_options(options: Namespace, ckpt: Path, output: Path) -> None:
    for name in ("text_tokens", "held_out_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be >= 1")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed ({options.seed}) must be >= 0 and < 2**32")
    if options.report is not None and options.report.resolve() == output.resolve():
        raise UserError(f"--report ({options.report}) must be another file than --output ({output})")
    for path in (output, *([] if options.report is None else [options.report])):
        check_output_file(path, ckpt, kept=())  # below it replaces nothing at all
        if path.exists():
            raise UserError(f"output {path} must not exist yet: no file is replaced")
    if output.suffix.lower() == ".onnx":
        raise UserError(f"output {output} must not end with .onnx: that ending is for exported models")


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix upcycle",
        description="Cut the feed-forward layers of a trained language model into tiles, and write a new checkpoint.\n"
        "The layers must be one ternary tile each, or dense; dense ones become ternary. Neurons that are active together make\n"
        "a tile, and signatures are fitted that send each token to the tiles which its layer's output needs most. Where all\n"
        "tiles are chosen, the function is the same. The loss on held-out text is printed beside controls of equal width.",
        epilog="examples:\n"
        "  trix upcycle runs/dense --tiles 16 --top-k 4 --output tiles.ckpt\n"
        "  trix upcycle runs/dense --tiles 16 --top-k 8 --freeze --output tiles.ckpt --report tiles.json",
    )
    parser.add_argument("ckpt", metavar="CKPT", help=CHECKPOINT_HELP).complete = FILE
    parser.add_argument("--tiles", type=int, required=True, metavar="E", help="tiles of each layer; E divides its neurons")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="tiles that each token goes to")
    parser.add_argument("--output", required=True, help="the checkpoint to write, which does not exist yet").complete = FILE
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the losses, as JSON").complete = FILE
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=16_384,
        metavar="N",
        help="tokens of the run's training text to group neurons and fit signatures on (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=32_768,
        metavar="N",
        help="largest number of tokens of its validation text to measure on (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of groups and signatures (default: %(default)s)")
    parser.add_argument("--freeze", action="store_true", help="freeze the signatures: no further training moves them")
    parser.add_trust()
    return parser
