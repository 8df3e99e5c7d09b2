"""StabilityMonitor: the gradient norm, and a run that ends before a number that is not finite does harm."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_runs import MakeTrainer

from lightning_modules.callbacks import LastCheckpoint, StabilityMonitor
from lightning_modules.callbacks.run_record import read_metrics
from lightning_modules.callbacks.stability import FAILURE_TYPES
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import LanguageModelTask

NORM = "network.norm.weight"


class Spoil(L.Callback):
    """From one training step on (counted from 1), put a value into the gradient of the last norm, or multiply all gradients."""

    def __init__(self, first_step: int, value: float | None = None, factor: float = 1.0) -> None:
        self.first_step, self.value, self.factor = first_step, value, factor
        self.weights: dict[str, torch.Tensor] = {}
        self.norm = 0.0

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if trainer.global_step + 1 >= self.first_step:
            if not self.weights:
                self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            if self.value is not None:
                gradients[NORM][0] = self.value
            for gradient in gradients.values():
                gradient *= self.factor
        self.norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def test_the_norm_before_clipping_is_logged(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    spoil = Spoil(1, factor=100.0)
    logger = CSVLogger(tmp_path)
    settings: dict[str, Any] = {"logger": logger, "log_every_n_steps": 2, "gradient_clip_val": 0.5, "max_steps": 4}
    make_trainer(callbacks=[StabilityMonitor(), spoil], **settings).fit(language_model, text)
    rows = read_metrics(Path(logger.log_dir) / "metrics.csv")
    norms = [row["train/gradient_norm"] for row in rows if "train/gradient_norm" in row]
    assert len(norms) == 2
    assert all("train/loss" in row for row in rows if "train/gradient_norm" in row)
    assert norms[-1] == pytest.approx(spoil.norm, rel=1e-5)
    assert spoil.norm > 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(
    value: float, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    spoil = Spoil(3, value)
    trainer = make_trainer(max_steps=8, gradient_clip_val=1.0, callbacks=[StabilityMonitor(), spoil])
    with pytest.raises(UserError) as caught:
        trainer.fit(language_model, text)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert str(caught.value) == (
        f"the gradient of step 3 must be finite: it is not in {NORM}; lower model.optimizer.lr (now {rate:.3g}) or lower "
        "trainer.gradient_clip_val (1.0); no checkpoint has been written"
    )
    assert trainer.global_step == 2
    assert all(torch.equal(value, spoil.weights[name]) for name, value in language_model.state_dict().items())


def test_between_two_looks_it_goes_on_but_saves_nothing(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monitor = StabilityMonitor(every_n_steps=5)
    trainer = make_trainer(max_steps=8, val_check_interval=1.0, limit_val_batches=0, callbacks=[monitor, Spoil(2, math.nan)])
    with pytest.raises(UserError, match=r"^the loss of step 2 \(nan\) must be finite: train/loss nan"):
        trainer.fit(language_model, text)
    assert trainer.global_step == 4
    with pytest.raises(UserError, match="of step 2"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_the_last_steps_are_looked_at_too(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    callbacks = [StabilityMonitor(every_n_steps=50), Spoil(4, math.nan)]
    with pytest.raises(UserError, match="of step 4"):
        make_trainer(max_steps=4, limit_val_batches=0, callbacks=callbacks).fit(language_model, text)


def test_the_checkpoint_that_was_written_last_is_named(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    callbacks = [StabilityMonitor(), LastCheckpoint(), Spoil(3, math.nan)]
    with pytest.raises(UserError, match=r"; the last good checkpoint is \S*/checkpoints/last\.ckpt$"):
        make_trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True).fit(language_model, text)


def test_weights_that_are_not_finite_are_not_saved(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[StabilityMonitor()])
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    language_model.get_parameter(NORM).data[0] = math.inf
    with pytest.raises(UserError, match=rf"^{NORM} after step 2 must be finite to be saved; "):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == content


def test_a_gradient_scaler_may_meet_gradients_that_overflow(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    class Precision(L.pytorch.plugins.Precision):
        scaler = object()  # Lightning has one for a GPU only

    trainer = make_trainer(callbacks=[StabilityMonitor(), Spoil(2, math.inf)], plugins=[Precision()], limit_val_batches=0)
    trainer.fit(language_model, text)
    assert trainer.global_step == 2


def test_with_accumulated_gradients_every_batch_counts(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = LanguageModelTask.training_step

    def first_batch_bad(self: LanguageModelTask, batch: Any) -> Any:
        output = training_step(self, batch)
        if self.trainer.fit_loop.epoch_loop.batch_idx == 0:
            output["loss"] = output["loss"] + math.inf  # its gradient is finite
        return output

    monkeypatch.setattr(LanguageModelTask, "training_step", first_batch_bad)
    with pytest.raises(UserError, match=r"^the loss of step 1 \(inf\) must be finite"):
        make_trainer(accumulate_grad_batches=2, callbacks=[StabilityMonitor()]).fit(language_model, text)


@pytest.mark.parametrize("on_spike", ["warn", "stop"])
def test_a_gradient_that_explodes_is_told(
    on_spike: Any, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    monitor = StabilityMonitor(on_spike=on_spike)
    trainer = make_trainer(max_steps=30, limit_val_batches=0, callbacks=[monitor, Spoil(25, factor=1e5)])
    message = r"the gradient norm of step 25 \(\d.*\) must be <= spike_factor \(30\) \* the median of the steps before \(\d"
    if on_spike == "stop":
        with pytest.raises(UserError, match=message):
            trainer.fit(language_model, text)
        assert trainer.global_step == 24
    else:
        with pytest.warns(UserWarning, match=message) as caught:
            trainer.fit(language_model, text)
        assert sum("spike_factor" in str(warning.message) for warning in caught) == 1
        resumed = StabilityMonitor()
        resumed.load_state_dict(monitor.state_dict())
        assert resumed.state_dict() == monitor.state_dict()
        assert monitor.state_dict()["has_warned"]
        assert len(monitor.state_dict()["norms"]) == 30


def test_a_validation_that_is_not_finite_gives_no_checkpoint(
    language_model: LanguageModelTask, text: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation_step = LanguageModelTask.validation_step

    def bad(self: LanguageModelTask, batch: Any) -> Any:
        output = validation_step(self, batch)
        self.mean_loss.update(math.nan)
        return output

    monkeypatch.setattr(LanguageModelTask, "validation_step", bad)
    keeper = ModelCheckpoint(tmp_path, "best", monitor="val/loss", save_last=True)
    trainer = L.Trainer(
        max_steps=4,
        val_check_interval=2,
        num_sanity_val_steps=1,  # that one is passed over: nothing has been learned yet
        accelerator="cpu",
        logger=False,
        callbacks=[keeper, StabilityMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(UserError, match=r"^val/loss after step 2 \(nan\) must be finite; .*no checkpoint has been written$"):
        trainer.fit(language_model, text)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps \(0\) must be >= 1"),
        ({"spike_factor": 1.0}, r"spike_factor \(1.0\) must be > 1"),
        ({"spike_factor": math.nan}, r"spike_factor \(nan\) must be > 1"),
        ({"on_spike": "panic"}, r"on_spike \('panic'\) must be 'warn' or 'stop'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**arguments)


def test_tensors_are_checked_by_name() -> None:
    monitor = StabilityMonitor()
    gradients = [torch.ones(2), None, torch.tensor([1.0, math.nan])]
    assert monitor.check_tensors({"loss": torch.tensor(1.0), "grads": gradients, "rate": 0.1}) == {
        "loss": True,
        "grads": False,
        "rate": True,
        "all_finite": False,
    }
    assert monitor.check_tensors({"x": torch.tensor([1, 2]), "y": {"z": torch.ones(1)}})["all_finite"]
    assert not monitor.check_tensors({"x": -math.inf})["all_finite"]
    assert monitor.check_tensors({}) == {"all_finite": True}


def test_the_condition_number_is_that_of_the_singular_values() -> None:
    monitor = StabilityMonitor()
    left, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128))
    right, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128))
    sigma = torch.tensor([1e6, 3.0, 2.0, 1e-3], dtype=torch.complex128)
    assert monitor.check_condition_number(left @ torch.diag(sigma) @ right) == pytest.approx(1e9, rel=1e-6)
    assert monitor.check_condition_number(torch.eye(3)[:2]) == 1.0
    assert monitor.check_condition_number(torch.diag(torch.tensor([1.0, 0.0]))) == math.inf
    assert math.isnan(monitor.check_condition_number(torch.tensor([[math.nan]])))
    with pytest.raises(ValueError, match=r"shape of H \(\(3,\)\) must be \[rows, columns\]"):
        monitor.check_condition_number(torch.ones(3))


def birman_schwinger(v: torch.Tensor, z: complex) -> torch.Tensor:
    """|V|^(1/2) R0(z) sgn(V) |V|^(1/2), densely."""
    hopping = torch.diag(torch.ones(len(v) - 1, dtype=torch.complex128), 1)
    free = torch.linalg.inv(hopping + hopping.T - z * torch.eye(len(v)))
    root = v.abs().sqrt()
    return root[:, None] * free * (v.sign() * root)[None, :]


@pytest.mark.parametrize("z", [1j, 0.3 + 0.01j, 1.95 + 0.01j, -2.5 + 10j])
@pytest.mark.parametrize("kind", ["ones", "one site", "random"])
def test_a_kernel_of_a_potential_keeps_the_schatten_bounds(z: complex, kind: str) -> None:
    v = {"ones": torch.ones(64), "one site": torch.eye(64)[20] * 3, "random": torch.randn(64)}[kind].double()
    kernel, monitor = birman_schwinger(v, z), StabilityMonitor()
    assert monitor.check_schatten_bounds(kernel, 1.0, z)
    assert monitor.check_schatten_bounds(kernel.to(torch.complex64), 0.5, z)
    wrong = kernel + 100 * (1 + v.abs().sum() / z.imag) * (1 - torch.eye(64))
    assert not monitor.check_schatten_bounds(wrong, 1.0, z)
    assert not monitor.check_schatten_bounds(kernel * math.nan, 1.0, z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), 1.0, 1j), r"shape of K \(\(2, 3\)\) must be \[n, n\]"),
        ((torch.ones(2, 2), 0.0, 1j), r"epsilon \(0.0\) must be > 0"),
        ((torch.ones(2, 2), 1.0, 1 + 0j), r"Im z \(0.0\) must be > 0"),
    ],
)
def test_what_the_schatten_bounds_need(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityMonitor().check_schatten_bounds(*arguments)


def test_each_failure_has_its_advice() -> None:
    advice = [StabilityMonitor().suggest_recovery(failure) for failure in FAILURE_TYPES]
    assert len(set(advice)) == len(FAILURE_TYPES) == 5
    with pytest.raises(ValueError, match=r"failure_type \('loss_spikes'\) must be one of .*; did you mean loss_spike\?"):
        StabilityMonitor().suggest_recovery("loss_spikes")
