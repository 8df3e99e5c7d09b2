"""What the actions of ``trix sae`` read: trained autoencoders, the activations they learned from, and the model of those."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.errors import UserError
from lightning_modules.explained_model import ExplainedModel, read_model
from lightning_modules.run_folder import best_checkpoint

if TYPE_CHECKING:
    from lightning_modules.data.activations import ActivationDataModule
    from lightning_modules.tasks.sparse_autoencoder import SparseAutoencoderTask
    from trix.superposition.dump.manifest import Identity

EXIT_NO_BETTER = 3  # an autoencoder that is not shown to be better than its controls


@dataclass(frozen=True)
class SAERun:
    """ckpt: the file that was read. task: with its autoencoders as they were trained. data: the dump they learned from."""

    ckpt: Path
    task: "SparseAutoencoderTask"
    data: "ActivationDataModule"

    @property
    def identity(self) -> "Identity":
        """What the activations are of: model, texts, site, settings."""
        return self.data.dump.manifest.identity

    def check_model(self, model: ExplainedModel) -> None:
        """Raise UserError unless the activations are those of the model."""
        found = model.backend.digest()
        if found != self.identity.model:
            raise UserError(
                f"{model.path}: digest of the model ({found[:12]}) must be that of the model whose activations {self.ckpt} "
                f"learned from ({self.identity.model[:12]})"
            )

    def provenance(self, model: ExplainedModel, command: Sequence[str]) -> dict[str, Any]:
        """Where figures come from, as plain values: the command, when and where it ran, and digests of all that it read."""
        from lightning_modules.callbacks.run_record import environment

        with self.ckpt.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {
            "run": str(self.ckpt),
            "checkpoint_sha256": digest,
            "model": model.path,
            "model_digest": self.identity.model,
            "dump": str(self.data.dump.folder),
            "dump_sha256": self.data.dump_sha256,
            "activations": self.identity.model_dump(),
            "command": list(command),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "environment": environment(),
        }


def open_run(path: str, action: str, trusted: Collection[str] = ()) -> SAERun:
    """A trained autoencoder and its data.

    Raises:
        UserError: no such checkpoint, or one of another task; no dump, or one that has changed.
    """
    ckpt = best_checkpoint(Path(path))
    task, checkpoint = load_task(str(ckpt), f"sae {action}", trusted)
    from lightning_modules.data.activations import ActivationDataModule
    from lightning_modules.tasks.sparse_autoencoder import SparseAutoencoderTask

    if not isinstance(task, SparseAutoencoderTask):
        raise UserError(f"{ckpt}: task ({task.task_name!r}) must be sparse_autoencoder")
    data = run_data(task, checkpoint, ckpt, trusted).module
    if not isinstance(data, ActivationDataModule):
        raise UserError(f"{ckpt}: data ({type(data).__name__}) must be ActivationDataModule")
    _check_dump(checkpoint, data, ckpt)
    return SAERun(ckpt, task, data)


def _check_dump(checkpoint: dict[str, Any], data: "ActivationDataModule", ckpt: Path) -> None:
    """Raise UserError where the dump is not the one of the training: then what is held out now was not held out then."""
    try:
        trained_on = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["settings"]["dump_sha256"]
    except (KeyError, IndexError, TypeError):  # a checkpoint without the state of its training
        return
    if trained_on != data.dump_sha256:
        raise UserError(
            f"{data.dump.folder}: digest of the dump ({data.dump_sha256[:12]}) must be that of the dump on which {ckpt} was "
            f"trained ({str(trained_on)[:12]}): it has been written anew since"
        )


def open_model(path: str, run: SAERun, action: str, trusted: Collection[str] = ()) -> ExplainedModel:
    """The model that an autoencoder explains.

    Raises:
        UserError: no such model, or not the one that the activations are of.
    """
    model = read_model(path, f"sae {action}", trusted)
    run.check_model(model)
    return model


def add_run(parser: CommandParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder of `trix fit --config configs/sae.yaml`, which means its newest best.ckpt, or a checkpoint",
    ).complete = FILE


def add_model(parser: CommandParser) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="the model that the activations are of: a checkpoint, a run folder, or the folder of a model of Hugging Face",
    ).complete = FILE
