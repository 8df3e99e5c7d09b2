"""Reading checkpoint files: as plain data (no code in a file is ever run), with an error that says what is wrong."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.class_paths import class_path, import_class, import_parts, part_paths
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.tasks.checkpoint_file import load_plain, walk
from lightning_modules.tasks.task import CHECKPOINT_KEY, CHECKPOINT_VERSION, CheckpointError, TrixTask
from lightning_modules.tasks.upgrade import COPIES, upgrade
from lightning_modules.trust import OWN
from trix.routing import SignatureRouter

# What every checkpoint holds; and what those lack that were saved without the state of the training.
PARTS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
}
OPTIMIZER_PARTS: dict[str, type] = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list}

# What checkpoints named before they stored class paths.
TASKS_BY_NAME = {
    "language_model": "lightning_modules.tasks.language_model.LanguageModelTask",
    "classifier": "lightning_modules.tasks.classifier.ClassifierTask",
}

# Of tables that a network computes from its configuration alone, as the rotary positions: 256 MiB.
MAX_TABLE_ELEMENTS = 2**26
_BLOCK = re.compile(r"network\.stack\.blocks\.(\d+)\.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_checkpoint(path: Path | str, trusted: Collection[str] = ()) -> tuple[TrixTask, dict[str, Any]]:
    """The task of a checkpoint, with its weights, in evaluation mode on the CPU; and the whole checkpoint.

    Args:
        trusted: the modules, besides this project's, whose task and parts of a network the checkpoint may name.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, :func:`~lightning_modules.class_paths.import_class` and
            :func:`load_weights`, or the weights do not fit the hyperparameters.
    """
    checkpoint = read_checkpoint(path)
    return make_task(checkpoint, path, trusted), checkpoint


def make_task(checkpoint: Mapping[str, Any], path: Path | str, trusted: Collection[str] = ()) -> TrixTask:
    """The task of what was read from a checkpoint, or from a folder of the Hub, in evaluation mode.

    Args:
        checkpoint: state_dict, hyper_parameters, and what it says of itself. path: what errors call it. trusted: as
            :func:`load_checkpoint`.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    try:
        kind = import_class(_task_class(checkpoint[CHECKPOINT_KEY]), TrixTask, path, trusted)  # type: ignore[type-abstract]
    except UserError as error:
        raise CheckpointError(str(error)) from error
    name = checkpoint[CHECKPOINT_KEY].get("task")
    if name != kind.task_name:
        raise CheckpointError(f"{path}: task ({name!r:.40}) must be {kind.task_name!r}, the name of {class_path(kind)}")
    try:
        import_parts(checkpoint["hyper_parameters"], path, trusted)
        task = _make_task(kind, checkpoint)
        load_weights(task, checkpoint["state_dict"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return task.eval()


def load_weights(task: TrixTask, state_dict: Mapping[str, Any]) -> None:
    """Give a task the weights of a checkpoint.

    Raises:
        CheckpointError: as ``TrixTask.load_state_dict`` and :func:`check_finite`; a value is of another kind of numbers than
            the task's own, or a layer is left with fewer tiles than a token goes to.
    """
    _check_tensors(state_dict)
    _check_kinds(task, state_dict)
    check_finite(state_dict)
    task.load_state_dict(state_dict)
    for name, module in task.network.named_modules():
        if isinstance(module, SignatureRouter) and not 1 <= module.top_k <= module.k_limit:
            raise CheckpointError(f"{name}: top_k ({module.top_k}) must be >= 1 and <= tiles in use ({module.k_limit})")


def check_finite(state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a weight or buffer that holds NaN or an infinity, with the first place of one."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.numel() == 0:
            continue
        if not all(bound.isfinite() for bound in value.aminmax()):  # NaN wins; nothing of the tensor's size is made
            place = (~value.isfinite()).nonzero()[0]
            found = value[tuple(place)].item()
            raise CheckpointError(f"weight {name.removeprefix('network.')} must be finite: it is {found} at {place.tolist()}")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint file that ``trix fit`` wrote, loaded with weights_only=True on the CPU.

    Raises:
        CheckpointError: the file is missing, not a regular file, unreadable, not a checkpoint, or not one of this project.
    """
    path = Path(path)
    checkpoint = load_plain(path)
    entry = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("version"), int):
        raise CheckpointError(f"{path} was not written by `trix fit`: it has no entry {CHECKPOINT_KEY!r}")
    if entry["version"] > CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint version ({entry['version']}) must be <= {CHECKPOINT_VERSION}: update trix")
    if "task_class" not in entry and entry.get("task") not in list(TASKS_BY_NAME):  # a list, for what is not hashable
        raise CheckpointError(f"{path}: task ({entry.get('task')!r}) must be one of {', '.join(TASKS_BY_NAME)}")
    _check_parts(checkpoint, path)
    upgrade(checkpoint, entry)
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a training can go on from the checkpoint."""
    for key in OPTIMIZER_PARTS:
        if key not in checkpoint:
            raise CheckpointError(f"the checkpoint holds no {key}, so no training can go on from it (save_weights_only: false)")


def _task_class(entry: Mapping[str, Any]) -> Any:
    return entry["task_class"] if "task_class" in entry else TASKS_BY_NAME[entry["task"]]


def _make_task(kind: type[TrixTask], checkpoint: Mapping[str, Any]) -> TrixTask:
    """A fresh task, made once it is known that its sizes are those of the weights in the file."""
    settings, state_dict = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    kind.check_sizes(settings, state_dict)
    try:
        with torch.device("meta"):  # parameters with shapes, but without memory
            sketch = kind(**settings)
    except Exception as error:  # what a wrong value leads to depends on where it is used first
        if any(path.split(".")[0] not in OWN for path in (class_path(kind), *part_paths(settings))):
            return _made(kind, settings)  # where one of these reads values as it is made, there can be no sketch
        raise CheckpointError(f"the hyperparameters of the checkpoint do not fit: {one_line(error)}") from error
    _check_tensors(state_dict)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nothing is copied to the meta device
        sketch.load_state_dict(state_dict)
    stored = sketch.state_dict().keys()
    num_elements = sum(value.numel() for name, value in sketch.named_buffers() if name not in stored)
    if num_elements > MAX_TABLE_ELEMENTS:
        raise CheckpointError(
            "the hyperparameters of the checkpoint do not fit: the tables that no weights are stored for, as the tables of "
            "positions, layers * 2 * context_length * width of "
            f"a head ({num_elements} elements), must be <= {MAX_TABLE_ELEMENTS}"
        )
    return _made(kind, settings)


def _made(kind: type[TrixTask], settings: Mapping[str, Any]) -> TrixTask:
    try:
        return kind(**settings)
    except Exception as error:  # of a task that does something else once its tensors hold values
        raise CheckpointError(f"the hyperparameters of the checkpoint do not fit: {one_line(error)}") from error


def check_blocks(settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the network's num_layers, of which objects are made one by one, is that of the weights."""
    network = settings.get("network")
    num_blocks = len({match[1] for match in map(_BLOCK.match, state_dict) if match})
    num_layers = network.get("num_layers", num_blocks) if isinstance(network, dict) else num_blocks
    if num_layers != num_blocks:
        raise CheckpointError(f"num_layers ({num_layers!r:.40}) must equal the number of blocks in the weights ({num_blocks})")


def check_head(settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless num_classes is the number of the head's rows."""
    head = state_dict.get("network.head.weight")
    num_rows = len(head) if isinstance(head, Tensor) and head.dim() > 0 else 0
    if "num_classes" in settings and settings["num_classes"] != num_rows:
        raise CheckpointError(f"num_classes ({settings['num_classes']!r:.40}) must equal the rows of the head ({num_rows})")


def _check_tensors(state_dict: Mapping[str, Any]) -> None:
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{name} ({_kind_of(value)}) of the checkpoint must be a plain tensor")
        if name.endswith("_extra_state") and (value.dtype != torch.uint8 or value.dim() != 1):
            raise CheckpointError(
                f"{name} ({value.dtype} {tuple(value.shape)}) of the checkpoint must be bytes, torch.uint8 [N]"
            )


def _check_kinds(task: TrixTask, state_dict: Mapping[str, Any]) -> None:
    """torch would turn any number into any other: complex into real, float into bool."""
    own = task.state_dict()
    for name, value in state_dict.items():
        if name not in own or not isinstance(value, Tensor):
            continue
        if own[name].dtype in _FLOATS and value.dtype not in _FLOATS:
            raise CheckpointError(f"dtype of {name} ({value.dtype}) must be float16, bfloat16, float32 or float64")
        was_float = name.endswith(".frozen_value_ED") and value.dtype in _FLOATS  # until frozen values were ternary
        if own[name].dtype not in _FLOATS and value.dtype != own[name].dtype and not was_float:
            raise CheckpointError(f"dtype of {name} ({value.dtype}) must be {own[name].dtype}")


def _kind_of(value: object) -> str:
    return f"{value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _strings(value: Any) -> Iterator[str]:
    return (text for text in walk(value) if isinstance(text, str))


def _check_parts(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Lightning takes these as they are: a wrong one would fail somewhere within it."""
    for key, kind in (PARTS | OPTIMIZER_PARTS | dict.fromkeys(COPIES, dict)).items():
        if key not in checkpoint and key not in PARTS:
            continue
        if key not in checkpoint:
            raise CheckpointError(f"{path}: the checkpoint lacks {key!r}")
        value = checkpoint[key]
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: {key} ({type(value).__name__}) of the checkpoint must be of type {kind.__name__}")
        if key == "loops" and not all(isinstance(loop, dict) for loop in checkpoint[key].values()):
            raise CheckpointError(f"{path}: the values of {key} of the checkpoint must be of type dict")
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"{path}: the keys of {key} of the checkpoint must be of type str")
    for text in _strings(checkpoint["hyper_parameters"]):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair of surrogates, which can be printed nowhere
            place = f"{text[error.start]!r} at {error.start}"
            raise CheckpointError(f"{path}: the hyperparameters must be valid Unicode, not {place} of a text") from error
