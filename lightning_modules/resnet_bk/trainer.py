"""Train any language model on loaders of one's own: lightning.Trainer behind a smaller interface."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.learning_rates import scale_rates
from lightning_modules.recomputed_blocks import recomputed_blocks
from lightning_modules.resnet_bk.checkpoint_manager import config_entry
from lightning_modules.resnet_bk.config import training_config
from lightning_modules.tasks.checkpoint_file import load_plain
from lightning_modules.tasks.cut_epoch import settle_epoch
from lightning_modules.tasks.task import CheckpointError
from lightning_modules.whole_files import WholeFileCheckpointIO
from trix.functional.next_tokens import IGNORED_LABEL, next_tokens

KEPT_CHECKPOINTS = 3


class Trainer:
    """Train a language model: mean cross entropy of the next token, in nats, by ``lightning.Trainer`` on one device.

    A batch is (input_ids, targets), both [B, N]; or input_ids alone, whose targets are its own next tokens; or a mapping with
    ``input_ids``, which may have an ``attention_mask`` for the model, and ``labels``, the next tokens of which are the targets.
    A target of -100 is passed over, and so are what padding is and what it would predict. The model answers
    ``model(input_ids)`` with logits [B, N, V], or with an object or mapping that has ``logits``.

    The scheduler takes a step with every training step (ReduceLROnPlateau after every evaluation, by the loss).

    Args:
        model, train_loader, val_loader, optimizer, scheduler: as above. optimizer: made of the model's parameters.
        config: keys of :class:`TrainingConfig`. Those left out have its defaults, except that the loader keeps its batch_size
            and the optimizer its learning_rate.
        checkpoint_dir: folder for a checkpoint every save_interval steps, of which the last three are kept.

    Attributes:
        history: what :meth:`train` returns.

    Raises:
        ConfigError: config is wrong. ValueError: batch_size is given, and train_loader makes its batches otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any],
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        checkpoint_dir: Path | str = "checkpoints",
    ) -> None:
        given = dict(config or {})
        self.config = training_config(given)
        self.model, self.train_loader, self.val_loader = model, _with_own_seeds(train_loader), _with_own_seeds(val_loader)
        self.optimizer, self.scheduler = optimizer, scheduler
        if "batch_size" in given:
            self.train_loader = _with_batch_size(self.train_loader, self.config.batch_size)
        if "learning_rate" in given:
            first = optimizer.param_groups[0]
            factor = self.config.learning_rate / float(first.get("initial_lr", first["lr"]))
            scale_rates(optimizer, [] if scheduler is None else [scheduler], factor)
        self._module = _Module(model, optimizer, scheduler, self.config.warmup_steps)
        self._history = _History(self.config.log_interval)
        self._callbacks: list[L.Callback] = [self._history, RandomState()]
        self._checkpoint_dir = Path(checkpoint_dir)
        self._made: L.Trainer | None = None
        self._resumed_from: str | None = None

    @property
    def history(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._history.values.items()}

    def add_callback(self, callback: L.Callback) -> None:
        """Let a Lightning callback watch the training, as StabilityMonitor and AutoRecovery."""
        self._callbacks.append(callback)
        if self._made is not None:
            self._made.callbacks.append(callback)  # type: ignore[attr-defined]

    def train(self) -> dict[str, list[float]]:
        """Train what is left of num_epochs epochs, and evaluate at the end.

        Returns:
            history: ``train_loss`` of each epoch; ``step``, ``loss`` and ``learning_rate`` every log_interval steps;
                ``val_step``, ``val_loss`` and ``val_perplexity`` of each evaluation, every eval_interval steps.
        """
        self._fit(self.config.num_epochs)
        step = self._lightning.global_step
        if self._history.values["val_step"][-1:] != [step]:
            self._history.add_evaluation(step, self.evaluate())
        return self.history

    def train_epoch(self, epoch: int) -> float:
        """Train the epoch of this number, counted from 0, which must be the next one; returns the mean loss of its batches.

        Raises:
            ValueError: another epoch is next.
        """
        done = len(self._history.values["train_loss"])
        if epoch != done:
            raise ValueError(f"epoch ({epoch}) must be the number of epochs before ({done})")
        self._fit(epoch + 1)
        return self._history.values["train_loss"][-1]

    def evaluate(self) -> dict[str, float]:
        """``loss``, the mean over all targets of val_loader in nats, and ``perplexity`` = exp(loss)."""
        (metrics,) = self._lightning.validate(self._module, self.val_loader, verbose=False)
        return {name.removeprefix("val/"): value for name, value in metrics.items()}

    def save_checkpoint(self, path: Path | str) -> None:
        """Write all that the training needs to go on, whole or not at all. Where the model's ``config`` is a dataclass, it is
        written, too, so that :meth:`trix.resnet_bk.LanguageModel.from_checkpoint` can read the file.

        Raises:
            OSError: the file cannot be written.
        """
        trainer = self._lightning
        if not trainer.optimizers:  # before the first step Lightning knows neither
            self._module.trainer = trainer
            trainer.strategy.connect(self._module)
            trainer.strategy.setup_optimizers(trainer)
        trainer.save_checkpoint(path, weights_only=False)

    def load_checkpoint(self, path: Path | str) -> None:
        """Take the weights at once; the rest of the training goes on from there.

        Raises:
            CheckpointError: the file cannot be read as plain data, was not written by save_checkpoint, or does not fit.
        """
        content = load_plain(Path(path))
        needed = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks")
        missing = [name for name in needed if not isinstance(content, dict) or name not in content]
        if missing:
            raise CheckpointError(f"checkpoint {path} must be one of a training, it lacks {', '.join(missing)}")
        try:
            self._module.load_state_dict(content["state_dict"])
        except (RuntimeError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[-1].strip()
            raise CheckpointError(f"checkpoint {path} must fit the model: {reason}") from error
        self._history.load_state_dict(content["callbacks"].get(self._history.state_key, {}))
        self._resumed_from, self._made = str(path), None

    @property
    def _lightning(self) -> L.Trainer:
        if self._made is None:
            config, steps = self.config, self.config.gradient_accumulation_steps
            keeper = ModelCheckpoint(
                self._checkpoint_dir,
                "{step}",
                monitor="step",
                mode="max",
                save_top_k=KEPT_CHECKPOINTS,
                every_n_train_steps=config.save_interval,
            )
            self._made = L.Trainer(
                max_epochs=config.num_epochs,
                devices=1,
                precision=_precision() if config.mixed_precision else "32-true",
                gradient_clip_val=config.gradient_clip_norm or None,
                accumulate_grad_batches=steps,
                val_check_interval=config.eval_interval * steps,
                check_val_every_n_epoch=None,
                num_sanity_val_steps=0,
                log_every_n_steps=config.log_interval,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*self._callbacks, keeper],
                plugins=[WholeFileCheckpointIO()],
            )
        return self._made

    def _fit(self, num_epochs: int) -> None:
        trainer, path = self._lightning, self._resumed_from
        trainer.fit_loop.max_epochs = num_epochs
        self._resumed_from = None
        with recomputed_blocks(self.model) if self.config.gradient_checkpointing else nullcontext():
            trainer.fit(self._module, self.train_loader, self.val_loader, ckpt_path=path, weights_only=True)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model answers, in float32 or float64: a tensor, or a mapping or an object that has ``logits``."""
    logits: Tensor = (
        output if isinstance(output, Tensor) else output["logits"] if isinstance(output, Mapping) else output.logits
    )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Module(L.LightningModule):
    """The model, with its steps."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, warmup_steps: int) -> None:
        super().__init__()
        self.model = model
        self._optimizer, self._scheduler, self._warmup_steps = optimizer, scheduler, warmup_steps
        self.last_rate = 0.0
        self.mean_loss = MeanMetric(nan_strategy=math.nan)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self._scheduler is None:
            return self._optimizer
        is_plateau = isinstance(self._scheduler, ReduceLROnPlateau)
        schedule: Any = {"scheduler": self._scheduler, "interval": "step", "reduce_on_plateau": is_plateau}
        schedule |= {"monitor": "val/loss", "strict": False}
        return {"optimizer": self._optimizer, "lr_scheduler": schedule}

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _, aux_loss = self._loss(batch)
        return loss if aux_loss is None else loss + aux_loss

    @override
    def on_validation_epoch_start(self) -> None:
        self.mean_loss.reset()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean_loss.update(*self._loss(batch)[:2])

    @override
    def on_validation_epoch_end(self) -> None:
        loss = self.mean_loss.compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()})

    @override
    def optimizer_step(self, *args: Any, **settings: Any) -> None:
        """A step at the share of the rate that the warm-up grants; a callback may change the rate meanwhile."""
        share = min((self.global_step + 1) / self._warmup_steps, 1.0) if self._warmup_steps else 1.0
        full = [group["lr"] for group in self._optimizer.param_groups]
        granted = [rate * share for rate in full]
        for group, rate in zip(self._optimizer.param_groups, granted, strict=True):
            group["lr"] = rate
        try:
            super().optimizer_step(*args, **settings)
        finally:
            self.last_rate = float(self._optimizer.param_groups[0]["lr"])
            for group, before, rate in zip(self._optimizer.param_groups, full, granted, strict=True):
                group["lr"] = before if group["lr"] == rate else group["lr"] / share

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(config_entry(self.model))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settle_epoch(checkpoint)

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mean over the targets, their number, and the auxiliary losses of a model that has some."""
        if isinstance(batch, Tensor):
            inputs, mask, target = batch[:, :-1], None, batch[:, 1:]
        elif isinstance(batch, Mapping):
            inputs, mask = batch["input_ids"], batch.get("attention_mask")
            target = next_tokens(batch.get("labels", inputs), mask)
        else:
            (inputs, target), mask = batch, None
        output = self.model(inputs) if mask is None else self.model(inputs, attention_mask=mask)
        exact = logits_of(output)
        loss = F.cross_entropy(exact.reshape(-1, exact.shape[-1]), target.reshape(-1), ignore_index=IGNORED_LABEL)
        return loss, (target != IGNORED_LABEL).sum(), getattr(output, "aux_loss", None)


class _History(L.Callback):
    """What has been measured, by name."""

    def __init__(self, log_interval: int) -> None:
        names = ("train_loss", "step", "loss", "learning_rate", "val_step", "val_loss", "val_perplexity")
        self.values: dict[str, list[float]] = {name: [] for name in names}
        self._log_interval, self._last_step = log_interval, 0
        self._losses: list[float] = []

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in {"step": step, **metrics}.items():
            self.values[f"val_{name}"].append(value)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if not outputs:  # a batch that has been left out
            return
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self._losses.append(loss)
        step = trainer.global_step
        if step % self._log_interval == 0 and step != self._last_step:
            self._last_step = step
            for name, value in {"step": step, "loss": loss, "learning_rate": pl_module.last_rate}.items():
                self.values[name].append(value)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("loss", "perplexity")}
            self.add_evaluation(trainer.global_step, metrics)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values["train_loss"].append(math.fsum(self._losses) / len(self._losses) if self._losses else math.nan)
        self._losses = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"values": {name: list(values) for name, values in self.values.items()}, "losses": list(self._losses)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values.update({name: list(values) for name, values in state_dict.get("values", {}).items()})
        self._losses = list(state_dict.get("losses", []))


def _precision() -> Any:
    return "16-mixed" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16-mixed"


def _with_own_seeds(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader, whose iterators draw their seeds from a generator of its own: evaluating changes no training."""
    if loader.generator is None:
        loader = copy(loader)
        loader.generator = torch.Generator()
    return loader


def _with_batch_size(loader: DataLoader[Any], batch_size: int) -> DataLoader[Any]:
    """The same loader with another batch size."""
    if loader.batch_size == batch_size:
        return loader
    if loader.batch_size is None:
        raise ValueError(f"batch_size ({batch_size}) must be left out: train_loader makes its batches in its own way")
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=None if isinstance(loader.dataset, IterableDataset) else loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
