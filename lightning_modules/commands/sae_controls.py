"""Train the controls of an autoencoder with the configuration of its run, and keep them in the folder of the run."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch

from lightning_modules.class_paths import class_path
from lightning_modules.commands.output_file import check_output_folder
from lightning_modules.commands.sae_run import SAERun
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.lightning_cli import TrixCLI
from lightning_modules.quiet import quiet_lightning
from lightning_modules.resume import CONFIG_NAME, log_folder
from lightning_modules.run_folder import CHECKPOINTS_NAME
from lightning_modules.tasks.checkpoint import read_checkpoint
from lightning_modules.tasks.sparse_autoencoder import MAIN, ActivationBatch, SparseAutoencoderTask
from lightning_modules.tasks.task import CHECKPOINT_KEY
from lightning_modules.trust import only_trusted_imports
from lightning_modules.yaml_files import check_yaml, read_yaml
from trix.regular_files import open_regular
from trix.superposition.evaluation.controls import train_steps
from trix.superposition.sae import RESTRAINTS, SAE, load_sae, save_sae
from trix.superposition.sae.load import CONFIG_FILE, WEIGHTS_FILE, read_json
from trix.whole_file import write_whole

FOLDER, DIGESTS_FILE = "controls", "sha256.json"
OTHER_SEED = "other_seed"
NAMES = (*RESTRAINTS, OTHER_SEED)
# What else changes what is learned; the loop of the controls has none of it.
PLAIN: dict[str, tuple[Any, ...]] = {
    "precision": (None, 32, "32", "32-true"),
    "accumulate_grad_batches": (1,),
    "gradient_clip_val": (None,),
    "limit_train_batches": (None, 1.0),
    "overfit_batches": (0.0,),
}
PLACES = {"path", "target", "model", "text"}  # settings of the data that say where things are
ON_GPU = ("auto", "gpu", "cuda")

Track = Callable[[Iterator[ActivationBatch], int, str], Iterator[ActivationBatch]]


@dataclass(frozen=True)
class Training:
    """How a run was trained.

    config: its config.yaml. accelerator: as it says. num_steps: those of the checkpoint. max_steps: what the learning rate's
    schedule spans.
    """

    run: SAERun
    config: Path
    seed: int
    accelerator: str
    num_steps: int
    max_steps: int
    trusted: Sequence[str]


def run_version(ckpt: Path) -> Path:
    """The folder of the run that a checkpoint is of: that with its logs."""
    return ckpt.parent.parent if ckpt.parent.name == CHECKPOINTS_NAME else ckpt.parent


def training_of(run: SAERun, trusted: Sequence[str] = ()) -> Training:
    """How a run was trained, as its configuration and its checkpoint say.

    Raises:
        UserError: no configuration is left, or the checkpoint is from before the first step.
    """
    checkpoint = read_checkpoint(run.ckpt)
    folder = log_folder(run.ckpt, checkpoint)
    if folder is None:
        raise UserError(f"{run.ckpt}: its run has left no {CONFIG_NAME}, by which controls are trained: --no-controls")
    config = folder / CONFIG_NAME
    check_yaml(config)
    settings = read_yaml(config)
    if not isinstance(settings, dict) or not isinstance(settings.get("trainer"), dict):
        raise UserError(f"{config} must hold the settings of a trainer")
    seed, accelerator = settings.get("seed_everything"), str(settings["trainer"].get("accelerator", "auto"))
    num_steps, max_steps = checkpoint["global_step"], checkpoint[CHECKPOINT_KEY].get("max_steps", -1)
    if num_steps < 1 or type(max_steps) is not int:
        raise UserError(f"{run.ckpt}: steps of the checkpoint ({num_steps}) must be >= 1, and max_steps ({max_steps!r}) an int")
    return Training(run, config, seed if type(seed) is int else 0, accelerator, num_steps, max_steps, trusted)


def trained_controls(
    training: Training, folder: Path, track: Track, say: Callable[[str], None], names: Sequence[str] = NAMES
) -> dict[str, SAE]:
    """The controls by name, read from the folder where they are there already as they were written to it, trained where not.

    Each learns from the same batches as the run, for as many steps, with the same optimizer, schedule and settings: one for
    each restraint with the seed of the run, and the run's own autoencoder with the next seed.

    Args:
        track: shows the progress of the steps; it gets the batches, their number and what they are for.
        say: is told what was trained, and how long it took.

    Raises:
        UserError: the configuration does not fit the checkpoint, or says what the loop of the controls does not do, or the
            folder cannot be written to.
    """
    with quiet_lightning(), only_trusted_imports(training.trusted):
        settings = _parts(training, training.seed, None).checked_settings(training)
        own, found = training.run.task.autoencoders[MAIN], dict[str, SAE]()
        for name in names:
            place = folder / f"{name}-{_digest(training, settings, name)[:16]}"
            kept = _kept(place, own)
            if kept is None:
                check_output_folder(place)
                start = time.perf_counter()
                _keep(_trained(training, name, track), place, name)
                kept = load_sae(place)
                say(f"trained {name}: {training.num_steps} steps in {time.perf_counter() - start:.0f} s, kept as {place}")
            found[name] = kept
    return found


def _keep(sae: SAE, place: Path, name: str) -> None:
    """Write a control, and last the digests of its files."""
    save_sae(sae, place, {"control": name})
    write_whole((json.dumps(_file_digests(place), indent=1) + "\n").encode(), place / DIGESTS_FILE)


def _kept(place: Path, own: SAE) -> SAE | None:
    """A control as it was written; None where there is none, where it was left in parts, or where it has changed since."""
    try:
        if read_json(place / DIGESTS_FILE) != _file_digests(place):
            return None
        return load_sae(place, own.d_model, own.k)
    except (ValueError, OSError):
        return None


def _file_digests(place: Path) -> dict[str, str]:
    """SHA-256 of each file of an autoencoder."""
    found = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with open_regular(place / name) as opened:
            found[name] = hashlib.sha256(opened.read()).hexdigest()
    return found


class _Parts(TrixCLI):
    """The task as `trix fit` would make it; nothing is started."""

    def after_instantiate_classes(self) -> None:
        """It checks what a run would write."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Not run."""

    @property
    def task(self) -> SparseAutoencoderTask:
        assert isinstance(self.model, SparseAutoencoderTask)
        return self.model

    def checked_settings(self, training: Training) -> dict[str, Any]:
        """What the training of an autoencoder depends on, as plain values.

        Raises:
            UserError: see :func:`trained_controls`.
        """
        given = self.config["fit"].as_dict()
        trainer, model = given["trainer"], given["model"]["init_args"]
        for name, plain in PLAIN.items():
            if trainer[name] not in plain:
                raise UserError(
                    f"{training.config}: trainer.{name} ({trainer[name]!r}) must be {plain[0]!r}, or controls would be "
                    "trained otherwise than the run: --no-controls leaves them out"
                )
        its_data = dict(training.run.data.hparams)
        for what, ours, stored in (
            ("autoencoder", _unrestrained(self.task), _unrestrained(training.run.task)),
            ("data", dict(self.datamodule.hparams), its_data),
        ):
            if ours != stored:
                raise UserError(f"{training.config}: {what} ({ours}) must be the checkpoint's ({stored})")
        return {
            "autoencoder": _unrestrained(self.task),
            "data": {name: value for name, value in its_data.items() if name not in PLACES},
            **training.run.data.identity(),
            "optimizer": model["optimizer"],
            "lr_scheduler": model["lr_scheduler"],
            "steps": [training.num_steps, training.max_steps],
        }


def _parts(training: Training, seed: int, restraint: str | None) -> _Parts:
    """restraint: None keeps that of the run."""
    changes: dict[str, Any] = {
        "seed_everything": seed,
        "trainer.accelerator": "cpu",  # of a trainer that trains nothing
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.logger": "false",
        "trainer.callbacks": "null",
        "trainer.enable_checkpointing": "false",
    }
    for name in PLACES & training.run.data.hparams.keys():  # where they are now
        value = training.run.data.hparams[name]
        changes[f"data.init_args.{name}"] = "null" if value is None else value
    if restraint is not None:
        changes["model.init_args.autoencoder.restraint"] = restraint
    options = [f"--{name}={value}" for name, value in changes.items()]
    arguments = ["fit", "--config", str(training.config), *options]
    return _Parts(arguments, given=[], own_config=training.config, trusted=training.trusted)


def _trained(training: Training, name: str, track: Track) -> SAE:
    is_other_seed = name == OTHER_SEED
    parts = _parts(training, training.seed + is_other_seed, None if is_other_seed else name)
    device = "cuda" if training.accelerator in ON_GPU and torch.cuda.is_available() else "cpu"
    task = parts.task.to(device)
    optimizer, scheduler = task.make_optimizer(training.max_steps)
    epochs = repeat(training.run.data.train_dataloader())

    def tracked(batches: Any) -> Iterator[ActivationBatch]:
        return track(batches, training.num_steps, name)

    try:
        sae = train_steps(
            task.autoencoders[MAIN],
            chain.from_iterable(epochs),
            training.num_steps,
            optimizer,
            scheduler,
            device,
            tracked,
        )
    except ValueError as error:
        raise UserError(f"control {name}: {one_line(error)}") from error
    return sae.cpu()


def _unrestrained(task: SparseAutoencoderTask) -> dict[str, Any]:
    """The settings of the main autoencoder, without what makes it a control."""
    settings = {name: task.hparams[name] for name in ("num_features", "num_outputs", "autoencoder")}
    return settings | {"autoencoder": {**settings["autoencoder"], "restraint": None}}


def _digest(training: Training, settings: dict[str, Any], name: str) -> str:
    own = training.run.task.hparams["autoencoder"]["restraint"] if name == OTHER_SEED else None
    key = [name, own, training.seed, settings, torch.__version__]
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=_named).encode()).hexdigest()


def _named(value: Any) -> str:
    """A class or function by its name, which, unlike its text, is the same in every process."""
    return class_path(value) if callable(value) else str(value)
