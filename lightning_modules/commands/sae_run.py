"""What the actions of ``trix sae`` read: trained autoencoders, the activations they learned from, and the model of those."""

import hashlib
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.errors import UserError
from lightning_modules.explained_model import ExplainedModel, read_model
from lightning_modules.run_folder import best_checkpoint

if TYPE_CHECKING:
    from lightning_modules.data.activation_stream import ActivationStream, Rows
    from lightning_modules.tasks.sparse_autoencoder import SparseAutoencoderTask
    from trix.superposition.dump.manifest import Identity
    from trix.superposition.sae import SAE

DATA_SETTINGS = "datamodule_hyper_parameters"  # Lightning's key
DIGESTS = {"dump_sha256": ("dump", "path"), "model_sha256": ("model", "model"), "text_sha256": ("texts", "text")}
READ_TOKENS = 400_000  # of a run that learned straight from a model
EXIT_NO_BETTER = 3  # an autoencoder that is not shown to be better than its controls


@dataclass(frozen=True)
class Places:
    """Where the things that a run learned from are now; None: where they were.

    model: of a run that learned straight from a model. dump, target: of a run that learned from dumps.
    """

    model: str | None = None
    dump: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class SAERun:
    """ckpt: the file that was read. task: with its autoencoders as they were trained. data: what they learned from."""

    ckpt: Path
    task: "SparseAutoencoderTask"
    data: "ActivationStream"

    @cached_property
    def identity(self) -> "Identity":
        """What the activations are of: model, texts, site, settings."""
        return self.data.origin()

    def autoencoder(self, name: str | None) -> tuple[str, "SAE"]:
        """One of the autoencoders and its name, in evaluation mode with the scales in its weights. None: the main one."""
        autoencoders = self.task.eval().autoencoders
        chosen = next(iter(autoencoders)) if name is None else name
        if chosen not in autoencoders:
            raise UserError(f"--autoencoder ({chosen}) must be one of {', '.join(autoencoders)}")
        return chosen, autoencoders[chosen].fold_()

    def check_model(self, model: ExplainedModel) -> None:
        """Raise UserError unless the activations are those of the model."""
        found = model.backend.digest()
        if found != self.identity.model:
            raise UserError(
                f"{model.path}: digest of the model ({found[:12]}) must be that of the model whose activations {self.ckpt} "
                f"learned from ({self.identity.model[:12]})"
            )

    def provenance(self, model: ExplainedModel, rows: "Rows", command: Sequence[str]) -> dict[str, Any]:
        """Where figures come from, as plain values: the command, when and where it ran, and digests of all that it read."""
        from lightning_modules.callbacks.run_record import environment

        with self.ckpt.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {
            "run": str(self.ckpt),
            "checkpoint_sha256": digest,
            "model": model.path,
            "model_digest": self.identity.model,
            "dump": self.data.hparams.get("path"),
            **self.data.identity(),
            "activations": self.identity.model_dump(),
            "tokens_read": len(rows.dump),
            "command": list(command),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "environment": environment(),
        }


def open_run(path: str, action: str, trusted: Collection[str] = (), places: Places = Places()) -> SAERun:
    """A trained autoencoder and its data.

    Raises:
        UserError: no such checkpoint, or one of another task; activations that are gone, that have changed, or of which other
            tokens were held out.
    """
    ckpt = best_checkpoint(Path(path))
    task, checkpoint = load_task(str(ckpt), f"sae {action}", trusted)
    from lightning_modules.data.activation_stream import ActivationStream
    from lightning_modules.tasks.sparse_autoencoder import SparseAutoencoderTask

    if not isinstance(task, SparseAutoencoderTask):
        raise UserError(f"{ckpt}: task ({task.task_name!r}) must be sparse_autoencoder")
    data = run_data(task, _placed(checkpoint, ckpt, places), ckpt, trusted).module
    if not isinstance(data, ActivationStream):
        raise UserError(f"{ckpt}: data ({type(data).__name__}) must be ActivationDataModule or ModelActivationDataModule")
    _check_data(checkpoint, data, ckpt)
    return SAERun(ckpt, task, data)


def _placed(checkpoint: dict[str, Any], ckpt: Path, places: Places) -> dict[str, Any]:
    """The checkpoint with the places of now in the settings of its data.

    Raises:
        UserError: a place of something that the run did not learn from, or a dump that is gone.
    """
    settings = checkpoint.get(DATA_SETTINGS)
    if not isinstance(settings, dict):
        return checkpoint
    settings = dict(settings)
    for option, key, place in (("--dump", "path", places.dump), ("--target", "target", places.target)):
        recorded = settings.get(key)
        if place is not None:
            if recorded is None:
                raise UserError(f"{option} ({place}) must be left out: {ckpt} learned from no such dump")
            settings[key] = place
        elif isinstance(recorded, str) and not Path(recorded).exists():
            raise UserError(f"dump {recorded}, which {ckpt} learned from, is not there: {option} DIR says where it is now")
    if places.model is not None and "model" in settings:
        settings["model"] = places.model
    return checkpoint | {DATA_SETTINGS: settings}


def _check_data(checkpoint: dict[str, Any], data: "ActivationStream", ckpt: Path) -> None:
    """Raise UserError where the activations are not those of the training: then what is held out now was not held out then."""
    from lightning_modules.data.activation_stream import trained_on

    settings = trained_on(checkpoint)
    if settings is None:
        return
    for name, found in data.identity().items():
        what, key = DIGESTS[name]
        trained = str(settings.get(name))
        if found != trained:
            place = data.hparams.get(key) or data.hparams.get("model")
            raise UserError(
                f"{place}: digest of the {what} ({found[:12]}) must be that of the {what} on which {ckpt} was trained "
                f"({trained[:12]}): it has changed since"
            )
    try:
        data.check_resumed(checkpoint)
    except UserError as error:
        raise UserError(f"{ckpt}: {error}") from error


def open_model(path: str, run: SAERun, action: str, trusted: Collection[str] = ()) -> ExplainedModel:
    """The model that an autoencoder explains.

    Raises:
        UserError: no such model, or not the one that the activations are of.
    """
    from lightning_modules.data.model_activations import ModelActivationDataModule

    if isinstance(run.data, ModelActivationDataModule) and run.data.explained.path == path:
        return run.data.explained  # read already
    model = read_model(path, f"sae {action}", trusted)
    run.check_model(model)
    return model


def add_run(parser: CommandParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder of `trix fit --config configs/sae.yaml`, which means its newest best.ckpt, or a checkpoint",
    ).complete = FILE


def places_of(options: Namespace) -> Places:
    """Where a command's options say that things are."""
    return Places(options.model, options.dump, options.target)


def add_dump(parser: CommandParser) -> None:
    parser.add_argument(
        "--dump",
        metavar="DIR",
        help="the dump that the run learned from, where it has been moved (default: where it was)",
    ).complete = FILE
    parser.add_argument(
        "--target", metavar="DIR", help="of a transcoder, the dump of its targets, where it has been moved"
    ).complete = FILE


def add_autoencoder(parser: CommandParser) -> None:
    parser.add_argument("--autoencoder", metavar="NAME", help="which of several in the run (default: the main one)")


def add_model(parser: CommandParser) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="the model that the activations are of: a checkpoint, a run folder, or the folder of a model of Hugging Face",
    ).complete = FILE
