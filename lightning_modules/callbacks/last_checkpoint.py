"""The checkpoints of a run in its own folder: the last one, and what a resumed run takes over."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.run_folder import CHECKPOINTS_NAME
from lightning_modules.tasks.checkpoint import read_checkpoint
from lightning_modules.whole_files import CHECKPOINT_SUFFIX, WholeFileCheckpointIO
from trix.whole_file import remove_abandoned, whole_file

LAST_NAME = "last.ckpt"
INTERRUPTED_NAME = "interrupted.ckpt"


class LastCheckpoint(Checkpoint):
    """Write last.ckpt after each validation (each epoch, where there is none) and as training ends.

    It is what ``trix fit --resume`` goes on from, so a run that is killed loses no more than it did since its last validation.
    :class:`ModelCheckpoint` keeps the best; its ``save_last`` writes only when the best has changed.

    A run that the user or a failure ends later than at a checkpoint also leaves interrupted.ckpt, with the weights as they are
    then. ``--resume`` prefers last.ckpt: what ends within a step cannot go on exactly, and may leave out a batch.

    A resumed run has a folder of its own. The checkpoint that it goes on from becomes its first last.ckpt, so that a run killed
    before its next validation goes on from there. The files that a ModelCheckpoint of the earlier run kept next to that
    checkpoint are copied into it, with their scores, so that the best one stays the best of the whole run. Where one is
    missing, was written after the checkpoint, or would replace a file, the ModelCheckpoint starts anew. Of
    the paths that a checkpoint holds nothing but the file names is used.

    ``trix`` adds it to every ``fit``, unless checkpoints are switched off. It writes none where a ModelCheckpoint has
    ``save_last``.

    Attributes:
        path: last.ckpt, in ``checkpoints`` in the folder of the logs (without logs: in the default folder of the trainer);
            None before it is written.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._folder = Path()
        self._last_step = 0
        self._is_writing = True
        self._copies: list[Path] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / CHECKPOINTS_NAME
        others = trainer.checkpoint_callbacks
        self._is_writing = not any(isinstance(other, ModelCheckpoint) and other.save_last for other in others)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last_step = checkpoint["global_step"]
        if trainer.ckpt_path is None:
            return
        self._take_over(Path(trainer.ckpt_path), trainer)
        # Lightning gives the callbacks their states after this.
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].pop(callback.state_key, None)
            if isinstance(callback, ModelCheckpoint) and state is not None:
                state = self._taken_over(state, Path(trainer.ckpt_path).parent, callback, trainer)
            if state is not None:
                checkpoint["callbacks"][callback.state_key] = state

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.enable_validation:
            self._save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _take_over(self, source: Path, trainer: L.Trainer) -> None:
        path = self._folder / LAST_NAME
        if not self._is_writing or path.exists():  # where the folder is that of the earlier run
            return
        self.path = path
        if trainer.is_global_zero:
            remove_abandoned(source.parent)  # half a checkpoint, where the earlier run was killed as it wrote one
            self._copy(source, path, trainer)

    def _taken_over(self, state: Any, source: Path, callback: ModelCheckpoint, trainer: L.Trainer) -> dict[str, Any] | None:
        """The state of a ModelCheckpoint, about files in its own folder; None where it has to start anew.

        Of the paths in a state the names alone count, for a checkpoint may come from anywhere. The files are those next to the
        checkpoint that the run goes on from, which lies in `source`. Where the callback has another folder they are copied
        there, unless one is missing, was written after the checkpoint, or would replace a file.
        """
        paths, folder = _stored_paths(state), str(callback.dirpath or "")
        if paths is None or not folder or "://" in folder:
            return None
        target, names = Path(folder), {Path(path).name for path in paths}
        is_in_place = target.resolve() == source.resolve()
        if is_in_place and not all((source / name).is_file() and not (source / name).is_symlink() for name in names):
            return None
        try:
            if not is_in_place and any(read_checkpoint(source / name)["global_step"] > self._last_step for name in names):
                return None
        except UserError:
            return None
        if not is_in_place:
            if trainer.strategy.broadcast(any((target / name).exists() for name in names)):  # a file that is there stays
                return None
            if trainer.is_global_zero:
                target.mkdir(parents=True, exist_ok=True)
                for name in names:
                    self._copy(source / name, target / name, trainer)

        def moved(path: str) -> str:
            return str(target / Path(path).name) if path else ""

        return state | {
            "dirpath": callback.dirpath,
            "best_model_path": moved(state["best_model_path"]),
            "kth_best_model_path": moved(state["kth_best_model_path"]),
            "best_k_models": {moved(path): score for path, score in state["best_k_models"].items()},
            "last_model_path": moved(state["last_model_path"]) if is_in_place else "",
        }

    def _copy(self, source: Path, target: Path, trainer: L.Trainer) -> None:
        with whole_file(target) as partial:
            shutil.copy2(source, partial)  # with its age: the newest counts where a folder holds several
        self._copies.append(target)
        if isinstance(trainer.strategy.checkpoint_io, WholeFileCheckpointIO):
            trainer.strategy.checkpoint_io.adopt(target)

    def withdraw(self) -> None:
        """Remove what this start has copied: the checkpoint cannot be resumed from."""
        for path in self._copies:
            path.unlink(missing_ok=True)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        is_worth_it = trainer.state.fn == "fit" and trainer.global_step > self._last_step
        is_failure = not isinstance(exception, UserError)  # those know which checkpoint is good
        if is_worth_it and is_failure and trainer.world_size == 1:  # other processes may not come to save with this one
            with suppress(Exception):  # a full disk, weights that are not finite: what ended the run is what counts
                trainer.save_checkpoint(self._folder / INTERRUPTED_NAME, weights_only=False)

    def _save(self, trainer: L.Trainer) -> None:
        if not self._is_writing or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.path = self._folder / LAST_NAME
        trainer.save_checkpoint(self.path, weights_only=False)


def withdraw_copies(trainer: L.Trainer) -> None:
    """See :meth:`LastCheckpoint.withdraw`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, LastCheckpoint):
            callback.withdraw()


def written_checkpoint(trainer: L.Trainer) -> tuple[Path, ModelCheckpoint | None] | None:
    """The checkpoint that stands for the run as a whole: the best, with what chose it, else the last; None without any."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            return Path(callback.best_model_path), callback
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
            return Path(callback.last_model_path), None
        if isinstance(callback, LastCheckpoint) and callback.path is not None:
            return callback.path, None
    return None


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The checkpoint that was written last; where the run has none yet, the one that it goes on from."""
    callbacks = trainer.checkpoint_callbacks
    names: list[Any] = [callback.path for callback in callbacks if isinstance(callback, LastCheckpoint)]
    for attribute in ("last_model_path", "best_model_path"):
        names += [getattr(callback, attribute) for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [path for path in map(Path, filter(None, names)) if path.is_file()]
    if paths:
        return max(paths, key=lambda path: path.stat().st_mtime_ns)
    return None if trainer.ckpt_path is None else Path(trainer.ckpt_path)


def _stored_paths(state: Any) -> list[str] | None:
    """The checkpoints that the state of a ModelCheckpoint names; None where it is no such state."""
    if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict):
        return None
    others = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
    paths = [path for path in (*state["best_k_models"], *others) if path != ""]
    is_fit = all(isinstance(path, str) and Path(path).suffix == CHECKPOINT_SUFFIX for path in paths)
    scores = [*state["best_k_models"].values(), state.get("best_model_score"), state.get("kth_value")]
    is_fit &= all(score is None or isinstance(score, float | int) or _is_scalar(score) for score in scores)
    return paths if is_fit else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
