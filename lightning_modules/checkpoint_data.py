"""A task and the data that it was trained on, rebuilt from its checkpoint alone."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.errors import UserError

if TYPE_CHECKING:
    import lightning as L

    from lightning_modules.data import RunData
    from lightning_modules.tasks import TrixTask

# What checkpoints named before they stored class paths.
DATA_BY_NAME = {
    "TextDataModule": "lightning_modules.data.text.TextDataModule",
    "DigitsDataModule": "lightning_modules.data.digits.DigitsDataModule",
    "LanguageIdDataModule": "lightning_modules.data.language_id.LanguageIdDataModule",
}


def load_task(ckpt: str, command: str, trusted: Collection[str] = ()) -> tuple["TrixTask", dict[str, Any]]:
    """The task of a checkpoint and the checkpoint, for a command that reads no exported models.

    Raises:
        UserError: an ONNX file is given; CheckpointError as ``load_checkpoint``.
    """
    if Path(ckpt).suffix.lower() == ".onnx":
        raise UserError(f"{ckpt}: `trix {command}` reads checkpoints: give the .ckpt file that the ONNX file was exported from")
    from lightning_modules.tasks import load_checkpoint

    return load_checkpoint(ckpt, trusted)


def run_data(task: "TrixTask", checkpoint: dict[str, Any], ckpt: Path | str, trusted: Collection[str] = ()) -> "RunData":
    """The data that a task was trained on; it is made, and its errors are raised, when it is first asked for.

    Args:
        trusted: the modules, besides this project's, whose data the checkpoint may name.

    Raises:
        UserError: then, where the checkpoint names no data, or data that it may not name; DataError: the data cannot be had, or
            has changed.
    """
    from lightning_modules.data import RunData

    def make() -> "L.LightningDataModule":
        data = _make_data(checkpoint, ckpt, trusted)
        task.check_data(data)
        return data

    return RunData(make)


def _make_data(checkpoint: dict[str, Any], ckpt: Path | str, trusted: Collection[str]) -> "L.LightningDataModule":
    import lightning as L

    from lightning_modules.class_paths import class_path, import_class
    from lightning_modules.data import TrixDataModule
    from lightning_modules.tasks.task import CHECKPOINT_KEY

    entry, settings = checkpoint[CHECKPOINT_KEY], checkpoint.get("datamodule_hyper_parameters", {})
    name = entry.get("data")
    path = entry["data_class"] if "data_class" in entry else DATA_BY_NAME.get(name) if isinstance(name, str) else None
    if path is None:
        raise UserError(f"{ckpt}: data module ({name!r:.40}) must be named by the checkpoint: held-out data is taken from it")
    if not isinstance(settings, dict):
        raise UserError(f"{ckpt}: datamodule_hyper_parameters ({type(settings).__name__}) must be keys and values")
    kind = import_class(path, L.LightningDataModule, ckpt, trusted)
    if kind is TrixDataModule:
        raise UserError(f"{path} (named by {ckpt}) must be a class derived from {class_path(TrixDataModule)}")
    try:
        return kind(**settings)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{ckpt}: the data settings of the checkpoint do not fit: {error}") from error
