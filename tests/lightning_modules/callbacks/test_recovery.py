"""AutoRecovery: a run in which a step goes wrong ends as if its batch had never been, at half the learning rate."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from small_runs import MakeTrainer, small_network
from torch import Tensor
from torch.optim import AdamW

from lightning_modules.callbacks import AutoRecovery, LastCheckpoint, StabilityMonitor
from lightning_modules.commands.surgery import is_equal
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.learning_rates import scale_rates
from lightning_modules.tasks import LanguageModelTask

NUM_STEPS, BAD_STEP = 30, 24  # counted from 0; late enough for medians to be known
Output = dict[str, Any]
ENDLESS = 2**60


class OutOfMemoryInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")


def multiplied(factor: float) -> Callable[[Output], Output]:
    return lambda output: output | {"loss": output["loss"] * factor}


def out_of_memory(output: Output) -> Output:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")


def out_of_memory_on_cpu(output: Output) -> Output:
    return output | {"loss": torch.empty(ENDLESS)}


class Task(LanguageModelTask):
    """With dropout; from `bad_steps` on the output of a step is what `spoil` makes of it."""

    def __init__(self, text: TextDataModule, spoil: Callable[[Output], Output] | None = None, **settings: Any) -> None:
        super().__init__(text.vocabulary, small_network(dropout=0.3), **settings)
        self.spoil, self.bad_steps, self.batch_idx_of_bad = spoil, {BAD_STEP}, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        output = super().training_step(batch)
        is_bad = (
            self.global_step in self.bad_steps and batch_idx % self.trainer.accumulate_grad_batches == self.batch_idx_of_bad
        )
        return output if self.spoil is None or not is_bad else self.spoil(dict(output))


class TaskWithout(Task):
    """Leaves the bad batch out from the start, and multiplies the learning rate."""

    factor = 0.5

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step not in self.bad_steps or batch_idx % self.trainer.accumulate_grad_batches != self.batch_idx_of_bad:
            return super().training_step(batch, batch_idx)
        if self.factor != 1.0:
            scale_rates(
                self.trainer.optimizers[0], [config.scheduler for config in self.trainer.lr_scheduler_configs], self.factor
            )
        return None


class SpoilGradient(L.Callback):
    """Multiply all gradients of the bad steps."""

    def __init__(self, factor: float, bad_steps: tuple[int, ...] = (BAD_STEP,)) -> None:
        self.factor, self.bad_steps = factor, bad_steps

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step in self.bad_steps:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)


def fit(
    make_trainer: MakeTrainer, text: TextDataModule, task: LanguageModelTask, *callbacks: L.Callback, **settings: Any
) -> L.Trainer:
    L.seed_everything(1)
    trainer = make_trainer(**({"max_steps": NUM_STEPS, "limit_val_batches": 0, "callbacks": list(callbacks)} | settings))
    trainer.fit(task, text)
    return trainer


def assert_equal(trainer: L.Trainer, expected: L.Trainer) -> None:
    """Weights, optimizers and schedules are bitwise equal, after as many steps."""
    assert trainer.global_step == expected.global_step == NUM_STEPS
    for made, wanted in zip(_states(trainer), _states(expected), strict=True):
        assert is_equal(made, wanted)


def _states(trainer: L.Trainer) -> list[Any]:
    schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    schedule.pop("lr_lambdas")
    weights = dict(trainer.lightning_module.state_dict())
    return [weights, trainer.optimizers[0].state_dict(), schedule, trainer.precision_plugin.state_dict()]


@pytest.fixture
def make_task(text: TextDataModule) -> Callable[..., LanguageModelTask]:
    def make(kind: type[Task] = Task, spoil: Callable[[Output], Output] | None = None, **settings: Any) -> LanguageModelTask:
        L.seed_everything(0)
        return kind(text, spoil, **settings)

    return make


MakeTask = Callable[..., Task]
RULES = {
    "nan": r"the loss of step 25 \(nan\) must not be NaN",
    "inf": r"the loss of step 25 \(inf\) must be finite",
    "spike": r"the loss of step 25 \(\d.*\) must be <= loss_spike_factor \(3\) \* the median of the losses before \(\d",
}


@pytest.mark.parametrize(("name", "factor"), [("nan", math.nan), ("inf", math.inf), ("spike", 100.0)])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_bad_loss_is_left_out(
    name: str, factor: float, accumulated: int, make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    settings = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    expected = fit(make_trainer, text, make_task(TaskWithout), **settings)
    recovery = AutoRecovery()
    with pytest.warns(UserWarning, match=RULES[name] + r".*: its batch is left out, .* \(recovery 1 of 3\)"):
        trainer = fit(make_trainer, text, make_task(spoil=multiplied(factor)), recovery, **settings)
    assert_equal(trainer, expected)
    assert recovery.num_recoveries == 1


@pytest.mark.parametrize(
    ("factor", "rule"),
    [
        (math.nan, r"the gradient norm of step 25 \(nan\) must not be NaN"),
        (
            1e5,
            r"the gradient norm of step 25 \(\d.*\) must be <= gradient_spike_factor \(30\) \* the median of the norms before",
        ),
    ],
)
@pytest.mark.parametrize("is_monitor_first", [True, False])
def test_a_bad_gradient_is_left_out(
    factor: float, rule: str, is_monitor_first: bool, make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    expected = fit(make_trainer, text, make_task(TaskWithout), gradient_clip_val=1.0)
    watching = [StabilityMonitor(on_spike="stop"), AutoRecovery()][:: 1 if is_monitor_first else -1]
    with pytest.warns(UserWarning, match=rule):
        trainer = fit(make_trainer, text, make_task(), *watching, SpoilGradient(factor), gradient_clip_val=1.0)
    assert_equal(trainer, expected)


@pytest.mark.parametrize(
    "spoil",
    [out_of_memory, out_of_memory_on_cpu, lambda output: output | {"loss": OutOfMemoryInBackward.apply(output["loss"])}],  # type: ignore[no-untyped-call]
    ids=["forward", "cpu", "backward"],
)
def test_where_memory_runs_out_the_batch_is_left_out_at_the_same_rate(
    spoil: Callable[[Output], Output],
    make_task: MakeTask,
    text: TextDataModule,
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TaskWithout, "factor", 1.0)
    expected = fit(make_trainer, text, make_task(TaskWithout))
    with pytest.warns(UserWarning, match=r"the memory must suffice for step 25 \("):
        trainer = fit(make_trainer, text, make_task(spoil=spoil), AutoRecovery())
    assert_equal(trainer, expected)


class BreakingAdamW(AdamW):
    """Weights become NaN in one step, though every gradient is finite."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.num_steps == BAD_STEP:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        self.num_steps += 1
        return loss


def test_weights_that_an_optimizer_breaks_are_put_back(
    make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    expected = fit(make_trainer, text, make_task(TaskWithout, optimizer=lambda parameters: AdamW(parameters, lr=1e-2)))
    task = make_task(optimizer=lambda parameters: BreakingAdamW(parameters, lr=1e-2))
    with pytest.warns(UserWarning, match=r"the weights after step 25 \(nan\) must not be NaN"):
        trainer = fit(make_trainer, text, task, AutoRecovery(), StabilityMonitor())
    assert_equal(trainer, expected)


def test_the_gradient_scaler_is_put_back_and_may_meet_overflows(
    make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    def half() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5))

    expected = fit(make_trainer, text, make_task(TaskWithout), SpoilGradient(math.inf, (7,)), plugins=[half()])
    recovery = AutoRecovery()
    task = make_task(spoil=multiplied(math.nan))
    with pytest.warns(UserWarning, match="recovery 1 of 3"):
        trainer = fit(make_trainer, text, task, recovery, SpoilGradient(math.inf, (7,)), plugins=[half()])
    assert_equal(trainer, expected)
    assert recovery.num_recoveries == 1
    assert trainer.precision_plugin.state_dict()["scale"] != 2.0**12


def test_one_failure_too_many_ends_the_run(make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer) -> None:
    task = make_task(spoil=multiplied(math.nan))
    task.bad_steps = set(range(3, NUM_STEPS))
    recovery, last = AutoRecovery(max_retries=2), LastCheckpoint()
    weights: list[dict[str, Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                weights.append({name: value.clone() for name, value in task.state_dict().items()})

    settings = {"enable_checkpointing": True, "val_check_interval": 2, "limit_val_batches": 1}
    message = (
        r"^the loss of step 6 \(nan\) must not be NaN; recoveries \(3\) must be <= max_retries \(2\); "
        r"lower model\.optimizer\.lr .*the last good checkpoint is \S*last\.ckpt$"
    )
    with pytest.raises(UserError, match=message), pytest.warns(UserWarning, match="recovery 2 of 2"):
        fit(make_trainer, text, task, recovery, last, Note(), **settings)
    assert is_equal(dict(task.state_dict()), weights[0])
    assert "training_step" not in vars(task)
    assert "backward" not in vars(task)


def test_memory_that_runs_out_too_often_is_the_error_that_it_was(
    make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit(make_trainer, text, make_task(spoil=out_of_memory), AutoRecovery(max_retries=0))


def test_another_error_is_not_answered(make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer) -> None:
    def broken(output: Output) -> Output:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fit(make_trainer, text, make_task(spoil=broken), AutoRecovery())


def test_a_spike_right_after_a_recovery_goes_back_to_the_file(
    make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The first batch without a failure then starts from the weights of the file."""
    starts: dict[int, dict[str, Tensor]] = {}

    class Save(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            starts[trainer.global_step] = {name: value.clone() for name, value in pl_module.state_dict().items()}
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "kept" / "a.ckpt")

    task = make_task(spoil=multiplied(100.0))
    task.bad_steps = {BAD_STEP, BAD_STEP + 1}
    with pytest.warns(UserWarning, match="recovery 2 of 3"):
        trainer = fit(make_trainer, text, task, AutoRecovery(str(tmp_path / "kept")), Save())
    assert is_equal(starts[BAD_STEP + 1], starts[BAD_STEP])
    assert is_equal(starts[BAD_STEP + 2], starts[10])
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 2e-3 / 4


def test_without_a_training_the_newest_checkpoint_is_gone_back_to(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    recovery = AutoRecovery(str(tmp_path), max_retries=2)
    assert not recovery.recover("nan_detected", model, optimizer)  # nothing to go back to
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    good, state = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.state_dict()["state"]
    for rate in (0.05, 0.025):
        with torch.no_grad():
            model.weight.fill_(math.nan)
        assert recovery.recover("nan_detected", model, optimizer)
        assert is_equal(dict(model.state_dict()), good)
        assert is_equal(optimizer.state_dict()["state"], state)
        assert optimizer.param_groups[0]["lr"] == rate
    assert not recovery.recover("nan_detected", model, optimizer)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": {"weight": 1}, "optimizer_states": [1]}, [1, 2]])
def test_a_checkpoint_that_does_not_fit_changes_nothing(content: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(content, tmp_path / "a.ckpt")
    assert not AutoRecovery(str(tmp_path)).recover("inf_detected", model, optimizer)
    assert is_equal(dict(model.state_dict()), before)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_failures_are_told_apart() -> None:
    recovery = AutoRecovery()
    for _ in range(25):
        assert recovery.detect_failure({"loss": torch.tensor(2.0), "gradient_norm": 0.5}) is None
    assert recovery.detect_failure({"loss": 5.9, "epoch": 3}) is None
    assert recovery.detect_failure({"loss": 6.1}) == "loss_spike"
    assert recovery.detect_failure({"loss": 2.0, "gradient_norm": 16.0}) == "gradient_explosion"
    assert recovery.detect_failure({"loss": math.nan, "gradient_norm": math.inf}) == "nan_detected"
    assert recovery.detect_failure({"grads": [torch.ones(2), torch.tensor([1.0, -math.inf])]}) == "inf_detected"
    assert recovery.detect_failure({"error": MemoryError()}) == "out_of_memory"
    assert recovery.detect_failure({"error": ValueError()}) is None
    perfect = AutoRecovery()
    assert {perfect.detect_failure({"loss": loss}) for loss in (*[0.0] * 25, 1e-9)} == {None}


def test_a_module_that_optimizes_by_hand_is_refused(
    make_task: MakeTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    task = make_task()
    task.automatic_optimization = False
    with pytest.raises(UserError, match=r"automatic_optimization of Task \(False\) must be True with AutoRecovery"):
        fit(make_trainer, text, task, AutoRecovery())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_retries": -1}, r"max_retries \(-1\) must be >= 0"),
        ({"loss_spike_factor": 1.0}, r"loss_spike_factor \(1.0\) must be > 1"),
        ({"gradient_spike_factor": math.nan}, r"gradient_spike_factor \(nan\) must be > 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoRecovery(**arguments)
    with pytest.raises(ValueError, match=r"failure_type \('nan'\) must be one of .*; did you mean nan_detected\?"):
        AutoRecovery().recover("nan", torch.nn.Linear(1, 1), AdamW([torch.nn.Parameter(torch.ones(1))]))
