"""Sparse autoencoders on the activations of a model.

Shapes: N tokens, D width of the activations, O width of the targets, K latents.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_modules.data.data_module import RunData
from lightning_modules.errors import DataError, UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.tasks.answers import Exporter
from lightning_modules.tasks.checkpoint import load_checkpoint
from lightning_modules.tasks.task import CheckpointError, LRSchedulerCallable, OptimizerCallable, TrixTask, default_lr_scheduler
from trix.superposition.analysis.stats import DENSITY_BORDERS, log_densities
from trix.superposition.evaluation.reconstruction import ReconstructionMetric
from trix.superposition.sae import ARCHITECTURES, SAE, SAEStep

MAIN = "sae"
LOGGED = ("explained_variance", "reconstruction", "active", "dead", "dense")  # of what ReconstructionMetric measures
MAX_LATENTS = 2**20

ActivationBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AutoencoderConfig:
    """One sparse autoencoder.

    Args:
        architecture: ``standard``, ``topk``, ``batch_topk``, ``jumprelu``, ``matryoshka``, ``transcoder``, or the import path
            of a :class:`trix.superposition.sae.SAE`. k: number of latents. settings: what it is made with besides, such as
            ``active``, the number of active latents per token. restraint: makes it a control, in which ``frozen_decoder``,
            ``soft_frozen_decoder`` or ``frozen_encoder`` weights stay random: see :meth:`trix.superposition.sae.SAE.restrain`.

    Raises:
        ValueError: k is not in [1, 2^20].
    """

    architecture: str = "batch_topk"
    k: int = 2048
    settings: dict[str, Any] = field(default_factory=dict)
    restraint: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_LATENTS:
            raise ValueError(f"k ({self.k}) must be >= 1 and <= {MAX_LATENTS}")


class SparseAutoencoderTask(TrixTask):
    """Train sparse autoencoders, each by its own loss, on one stream of activations.

    Logged for each, after ``train/`` and ``val/``, and after the name of the autoencoder where it is not the main one:
    ``reconstruction`` (mean square of x - x_hat over that of x) and ``active`` (L0, active latents per token). In training also
    ``loss``, ``sparsity``, ``aux``, and ``dead`` by the window of the autoencoder; in validation ``explained_variance``,
    ``dead`` and ``dense``: see :class:`~trix.superposition.evaluation.reconstruction.ReconstructionMetric`. TensorBoard also
    gets, at each validation, the histogram ``log10_density``: see :func:`~trix.superposition.analysis.log_densities`.

    The scale of the activations and their median, from which b_dec starts, come from the first batch.

    Shape:
        batches: (x_ND, target_NO), float; the target is x itself, except for a transcoder.

    Args:
        num_features: width of the activations. num_outputs: width of the targets, by default the same.
        autoencoder: the main one. others: further ones by name, such as controls; they learn from the same batches.
        optimizer: makes the optimizer from the parameters. Without weight decay, which would bend the directions.
        lr_scheduler: makes the schedule from the optimizer and trainer.max_steps; stepped every step.

    Raises:
        ValueError: an architecture that is not known, or what it says of its settings.
    """

    task_name = "sparse_autoencoder"
    network: nn.ModuleDict

    def __init__(
        self,
        num_features: int,
        num_outputs: int | None = None,
        autoencoder: AutoencoderConfig = AutoencoderConfig(),
        others: Mapping[str, AutoencoderConfig] | None = None,
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = default_lr_scheduler,
    ) -> None:
        if not isinstance(num_features, int):
            raise ValueError(f"num_features ({num_features}) must be an int: autoencoders need data of activations")
        configs = {MAIN: _config(autoencoder)} | {name: _config(value) for name, value in (others or {}).items()}
        if len(configs) <= len(others or {}) or not all(name.isidentifier() for name in configs):
            raise ValueError(f"names of others ({', '.join(others or {})}) must be Python names, and none may be {MAIN}")
        num_outputs = num_features if num_outputs is None else num_outputs
        saes = {name: _make(config, num_features, num_outputs) for name, config in configs.items()}
        super().__init__(nn.ModuleDict(saes), optimizer, lr_scheduler)
        self.evaluations = nn.ModuleDict({name: ReconstructionMetric(num_outputs, sae.k) for name, sae in saes.items()})
        self._steps: dict[str, SAEStep] = {}
        self._num_tokens = 0
        self.save_hyperparameters(
            {
                "num_features": num_features,
                "num_outputs": num_outputs,
                "autoencoder": asdict(configs[MAIN]),
                "others": {name: asdict(config) for name, config in configs.items() if name != MAIN},
            }
        )

    @property
    def autoencoders(self) -> dict[str, SAE]:
        """The autoencoders by name, the main one first."""
        return {name: cast(SAE, sae) for name, sae in self.network.items()}

    @override
    def forward(self, x: Tensor) -> Tensor:
        """What the main autoencoder makes of activations, float [N, O]."""
        return cast(Tensor, self.network[MAIN](x)[0])

    @override
    def check_data(self, datamodule: L.LightningDataModule) -> None:
        for name in ("num_features", "num_outputs"):
            found = getattr(datamodule, name, self.hparams[name])
            if found is not None and found != self.hparams[name]:
                raise DataError(f"{name} of the data ({found}) must equal the task's ({self.hparams[name]})")
        if getattr(datamodule, "has_target", False):
            for name, sae in self.autoencoders.items():
                if sae.centres_input:
                    raise DataError(f"architecture of {name} ({sae.architecture}) must be transcoder: the data have a target")

    @classmethod
    @override
    def check_sizes(cls, settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        width = settings.get("num_features")
        for name, config in {MAIN: settings.get("autoencoder"), **dict(settings.get("others") or {})}.items():
            weight = state_dict.get(f"network.{name}.W_enc")
            k = config.get("k") if isinstance(config, Mapping) else None
            if not isinstance(weight, Tensor) or list(weight.shape) != [width, k]:
                shape = list(weight.shape) if isinstance(weight, Tensor) else None
                raise CheckpointError(
                    f"the checkpoint's weights of {name} ({shape}) must be [num_features, k] ([{width}, {k}])"
                )

    @override
    def exportable(self, data: RunData, num_tokens: int) -> Exporter:
        raise UserError(
            "a sparse autoencoder has no ONNX file: load_autoencoder and save_sae write it as a folder, "
            "as docs/how-to/explain-a-model.md shows"
        )

    def on_train_batch_start(self, batch: ActivationBatch, batch_idx: int) -> None:
        if self.global_step == 0 and batch_idx == 0:
            for sae in self.autoencoders.values():
                sae.start_from(*batch)

    def training_step(self, batch: ActivationBatch) -> Tensor:
        self._steps = {name: sae.training_step(*batch) for name, sae in self.autoencoders.items()}
        self._num_tokens = len(batch[0])
        every = max(getattr(self.trainer, "log_every_n_steps", 1), 1)
        if (self.global_step + 1) % every == 0:  # to log costs as much as a small step
            self._log_training()
        return torch.stack([step.loss for step in self._steps.values()]).sum()

    def _log_training(self) -> None:
        for name, step in self._steps.items():
            num_dead = self.autoencoders[name].is_dead.float().mean()
            values = {"loss": step.loss, "reconstruction": step.reconstruction, "sparsity": step.sparsity, "aux": step.aux}
            values |= {"active": step.fired_K.sum() / self._num_tokens, "dead": num_dead}
            self.log_dict({_logged("train", name, key): value.detach() for key, value in values.items()})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        for sae in self.autoencoders.values():
            sae.before_optimizer_step()

    @override
    def optimizer_step(self, *args: Any, **settings: Any) -> None:
        super().optimizer_step(*args, **settings)
        for sae in self.autoencoders.values():
            sae.after_optimizer_step()

    def on_after_backward(self) -> None:
        # Not at the end of the batch: callbacks come first there, and a checkpoint would lack what the batch has shown.
        for name, step in self._steps.items():
            self.autoencoders[name].note(step, self._num_tokens)
        self._steps = {}

    def validation_step(self, batch: ActivationBatch) -> None:
        self._evaluate(batch)

    def test_step(self, batch: ActivationBatch) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: ActivationBatch) -> dict[str, Tensor]:
        """What the main autoencoder makes of the activations, and how many of its latents are active."""
        x_hat_NO, z_NK = self.network[MAIN](batch[0])
        return {"reconstruction": x_hat_NO, "active": (z_NK > 0).sum(dim=-1)}

    def on_validation_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_test_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")
        if not self.trainer.sanity_checking:
            self._log_densities()

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: ActivationBatch) -> None:
        x_ND, target_NO = batch
        for name, sae in self.autoencoders.items():
            x_hat_NO, z_NK = sae(x_ND)
            cast(ReconstructionMetric, self.evaluations[name]).update(x_hat_NO, target_NO, z_NK)

    def _reset_evaluation(self) -> None:
        for evaluation in self.evaluations.values():
            cast(ReconstructionMetric, evaluation).reset()

    def _log_evaluation(self, stage: str) -> None:
        for name, evaluation in self.evaluations.items():
            values = cast(ReconstructionMetric, evaluation).compute()
            self.log_dict(
                {_logged(stage, name, key): values[key] for key in LOGGED},
                prog_bar=name == MAIN,
                rank_zero_only=False,
            )

    def _log_densities(self) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                for name, evaluation in self.evaluations.items():
                    density_K = cast(ReconstructionMetric, evaluation).density_K
                    logger.experiment.add_histogram(
                        _logged("val", name, "log10_density"),
                        log_densities(density_K),
                        global_step=self.global_step,
                        bins=DENSITY_BORDERS,
                    )


def load_autoencoder(path: Path | str, name: str = MAIN, trusted: Collection[str] = ()) -> SAE:
    """An autoencoder of a checkpoint or run folder, in evaluation mode on the CPU, with the scales in its weights.

    Args:
        path: a checkpoint, or a run folder, which means its newest best.ckpt. name: which of several. trusted: as for
            :func:`~lightning_modules.tasks.load_checkpoint`.

    Raises:
        UserError: no such checkpoint, or none of this task; an autoencoder that it does not hold.
    """
    ckpt = best_checkpoint(Path(path))
    task, _ = load_checkpoint(ckpt, trusted)
    if not isinstance(task, SparseAutoencoderTask):
        raise UserError(f"{ckpt}: task ({task.task_name!r}) must be sparse_autoencoder")
    if name not in task.autoencoders:
        raise UserError(f"{ckpt}: autoencoder ({name!r}) must be one of {', '.join(task.autoencoders)}")
    return task.autoencoders[name].fold_()


def _config(values: AutoencoderConfig | Mapping[str, Any]) -> AutoencoderConfig:
    """A configuration, from itself or from what a checkpoint stores."""
    return values if isinstance(values, AutoencoderConfig) else AutoencoderConfig(**values)


def _make(config: AutoencoderConfig, num_features: int, num_outputs: int) -> SAE:
    if "d_out" in config.settings:
        given = config.settings["d_out"]
        raise ValueError(f"d_out in the settings ({given!r:.40}) must be left out: it is num_outputs ({num_outputs})")
    sizes = {} if num_outputs == num_features else {"d_out": num_outputs}
    sae = ARCHITECTURES.make(config.architecture, num_features, config.k, arguments={**config.settings, **sizes})
    if num_outputs != num_features and sae.centres_input:
        raise ValueError(f"num_outputs ({num_outputs}) must equal num_features ({num_features}), except for a transcoder")
    return sae if config.restraint is None else sae.restrain(config.restraint)


def _logged(stage: str, name: str, key: str) -> str:
    return f"{stage}/{key}" if name == MAIN else f"{stage}/{name}/{key}"
