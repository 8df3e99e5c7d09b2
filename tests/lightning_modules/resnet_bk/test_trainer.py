"""Trainer: every key of the configuration does something, and a training that was saved goes on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import trix.resnet_bk
from lightning_modules.callbacks import AutoRecovery, StabilityMonitor
from lightning_modules.commands.surgery import is_equal
from lightning_modules.resnet_bk import ConfigError, Trainer
from lightning_modules.tasks.task import CheckpointError
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

VOCAB, LENGTH, NUM_EXAMPLES = 11, 6, 24
PLAIN = {
    "num_epochs": 2,
    "warmup_steps": 0,
    "gradient_clip_norm": 0.0,
    "gradient_checkpointing": False,
    "mixed_precision": False,
    "log_interval": 2,
    "eval_interval": 5,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.num_forwards = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += self.training
        return x + torch.tanh(self.linear(x))


class StandIn(nn.Module):
    """Logits from the token at hand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = nn.Embedding(VOCAB, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, VOCAB)
        self.dropout = nn.Dropout(0.2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))


class Answer(NamedTuple):
    logits: Tensor


def loader(batch_size: int = 4, shuffle: bool = False) -> DataLoader[Any]:
    """Each token is followed by the same one."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, VOCAB, (NUM_EXAMPLES, 1), generator=generator)
    token = (start * 3 ** torch.arange(LENGTH + 1)) % VOCAB
    return DataLoader(TensorDataset(token[:, :-1], token[:, 1:]), batch_size, shuffle=shuffle)


def make(
    folder: Path,
    config: dict[str, Any] | None = None,
    kind: Callable[[], nn.Module] = StandIn,
    optimizer: Callable[[Any], Optimizer] = lambda parameters: AdamW(parameters, lr=0.05),
    schedule: Callable[[Optimizer], Any] | None = None,
    shuffle: bool = False,
) -> Trainer:
    L.seed_everything(0)
    model = kind()
    made = optimizer(model.parameters())
    scheduler = None if schedule is None else schedule(made)
    data = loader(shuffle=shuffle)
    return Trainer(model, data, loader(), made, scheduler, PLAIN | (config or {}), checkpoint_dir=folder / "checkpoints")


def record(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """What a training leaves."""
    history = trainer.train()
    blocks = list(trainer.model.blocks) if isinstance(trainer.model, StandIn) else []
    return {
        "weights": dict(trainer.model.state_dict()),
        "epochs": len(history["train_loss"]),
        "batches": sum(block.num_forwards for block in blocks),
        "steps": trainer.optimizer.state_dict()["state"][0]["step"].item(),
        "rates": history["learning_rate"],
        "logged": history["step"],
        "evaluated": history["val_step"],
        "files": sorted(path.name for path in folder.glob("checkpoints/*")),
    }


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("batch_size", 8, {"weights", "batches", "steps", "rates", "logged", "evaluated"}),
        ("learning_rate", 0.01, {"weights", "rates"}),
        ("num_epochs", 1, {"weights", "epochs", "batches", "steps", "rates", "logged", "evaluated"}),
        ("warmup_steps", 5, {"weights", "rates"}),
        ("gradient_clip_norm", 0.01, {"weights"}),
        ("gradient_checkpointing", True, {"batches"}),
        ("gradient_accumulation_steps", 2, {"weights", "steps", "rates", "logged", "evaluated"}),
        ("mixed_precision", True, {"weights"}),
        ("log_interval", 3, {"rates", "logged"}),
        ("eval_interval", 4, {"evaluated"}),
        ("save_interval", 5, {"files"}),
    ],
)
def test_every_key_changes_what_it_says(key: str, value: Any, changed: set[str], tmp_path: Path) -> None:
    before = record(make(tmp_path / "a"), tmp_path / "a")
    after = record(make(tmp_path / "b", {key: value}), tmp_path / "b")
    assert {name for name in before if not is_equal(before[name], after[name])} == changed
    assert before["evaluated"] == [5, 10, 12]
    assert (before["epochs"], before["steps"], before["batches"], before["logged"]) == (2, 12, 24, [2, 4, 6, 8, 10, 12])


def test_the_rate_grows_in_proportion_during_the_warm_up(tmp_path: Path) -> None:
    """Plain gradient descent on a weight whose gradient is constant takes steps in proportion to the rate."""
    moved: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            moved.append(float(model.bias[0].detach()))

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.bias.clamp(-1e-3, 1e-3).expand(*input_ids.shape, 2) * 1e-6

    model, zeros = Bias(), torch.zeros(6, 3, dtype=torch.int64)
    data: DataLoader[Any] = DataLoader(TensorDataset(zeros, zeros), 1)
    optimizer = SGD(model.parameters(), lr=1.0)
    trainer = Trainer(
        model, data, data, optimizer, config=PLAIN | {"warmup_steps": 4, "num_epochs": 1}, checkpoint_dir=tmp_path
    )
    trainer.add_callback(Watch())
    trainer.train()
    steps = [after - before for before, after in zip([0.0, *moved], moved, strict=False)]
    assert [step / steps[-1] for step in steps] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_it_learns_and_measures(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"num_epochs": 12})
    start = trainer.evaluate()
    history = trainer.train()
    assert trainer.train() == history  # nothing is left to train
    assert start["perplexity"] == pytest.approx(math.exp(start["loss"]), rel=1e-5)
    assert history["val_loss"][-1] < 0.3 < 2.0 < start["loss"]
    assert history["val_loss"][-1] == pytest.approx(trainer.evaluate()["loss"])
    trainer.model.eval()
    with torch.no_grad():
        logits = torch.cat([trainer.model(x) for x, _ in loader()]).double()
    target = torch.cat([y for _, y in loader()])
    assert trainer.evaluate()["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits.mT, target)), rel=1e-4)


def test_a_language_model_of_tiles_learns_the_same_where_its_blocks_are_computed_again(tmp_path: Path) -> None:
    config = LanguageModelConfig(16, 2, 2, LENGTH, ffn=FFNConfig(num_tiles=4))
    losses = []
    for is_checkpointing in (False, True):
        settings = {"gradient_checkpointing": is_checkpointing, "num_epochs": 5}
        trainer = make(tmp_path, settings, lambda: LanguageModel(VOCAB, config), lambda parameters: AdamW(parameters, lr=0.01))
        losses.append(trainer.train()["train_loss"])
        assert not any("forward" in vars(module) for module in trainer.model.modules())
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_training_that_was_saved_goes_on(shuffle: bool, tmp_path: Path) -> None:
    def fresh() -> Trainer:
        schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step)  # noqa: E731
        return make(tmp_path, {"warmup_steps": 8, "num_epochs": 4}, schedule=schedule, shuffle=shuffle)

    straight = fresh()
    losses = [straight.train_epoch(0), straight.train_epoch(1)]
    straight.save_checkpoint(tmp_path / "a.pt")
    losses += [straight.train_epoch(2), straight.train_epoch(3)]
    resumed = fresh()
    resumed.load_checkpoint(tmp_path / "a.pt")
    evaluation = resumed.evaluate()
    history = resumed.train()
    assert history["train_loss"] == losses
    assert is_equal(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))
    assert is_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert evaluation["loss"] > resumed.evaluate()["loss"]
    assert history["val_step"] == [5, 10, 15, 20, 24]


def test_what_is_saved_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    make(tmp_path).save_checkpoint(tmp_path / "a.pt")
    trainer = make(tmp_path)
    trainer.load_checkpoint(tmp_path / "a.pt")
    assert is_equal(trainer.train()["train_loss"], make(tmp_path).train()["train_loss"])


def test_what_it_saves_is_read_as_a_language_model(tmp_path: Path) -> None:
    def small() -> nn.Module:
        return trix.resnet_bk.LanguageModel(VOCAB, 16, 1, LENGTH, n_heads=2)

    trainer = make(tmp_path, {"save_interval": 5}, kind=small)
    trainer.train_epoch(0)
    trainer.save_checkpoint(tmp_path / "a.pt")
    model = trix.resnet_bk.LanguageModel.from_checkpoint(tmp_path / "a.pt")
    assert model.config == trainer.model.config
    assert is_equal(dict(model.state_dict()), dict(trainer.model.state_dict()))
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert trix.resnet_bk.LanguageModel.from_checkpoint(kept).config == model.config
    again = make(tmp_path, kind=small)
    again.load_checkpoint(tmp_path / "a.pt")
    again.train()


def test_epochs_come_in_order(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train_epoch(0)
    with pytest.raises(ValueError, match=r"epoch \(2\) must be the number of epochs before \(1\)"):
        trainer.train_epoch(2)


def test_callbacks_watch_and_recover(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"warmup_steps": 4})

    class Spoil(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.global_step in (2, 9):
                next(pl_module.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]

    recovery = AutoRecovery(str(tmp_path))
    for callback in (StabilityMonitor(), recovery, Spoil()):
        trainer.add_callback(callback)
    trainer.train_epoch(0)
    with pytest.warns(UserWarning, match="recovery 2 of 3"):
        trainer.train_epoch(1)
    assert recovery.num_recoveries == 2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 10


def test_a_plateau_lowers_the_rate(tmp_path: Path) -> None:
    trainer = make(tmp_path, schedule=lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5))
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize("kind", ["tokens", "mapping", "left", "labels", "labels and mask"])
def test_batches_of_other_forms_mean_the_same(kind: str, tmp_path: Path) -> None:
    token = torch.cat([torch.cat([x, y[:, -1:]], dim=1) for x, y in loader()])
    mask = torch.ones_like(token)
    if kind in ("mapping", "labels and mask"):  # what is padded has no say
        token, mask = torch.cat([token, token[:, :2]], dim=1), torch.cat([mask, mask[:, :2] * 0], dim=1)
    if kind in ("left", "labels and mask"):
        token, mask = torch.cat([token[:, :2], token], dim=1), torch.cat([mask[:, :2] * 0, mask], dim=1)
    forms: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "tokens": lambda token, mask: token,  # noqa: ARG005
        "mapping": lambda token, mask: {"input_ids": token, "attention_mask": mask},
        "left": lambda token, mask: {"input_ids": token, "attention_mask": mask},
        "labels": lambda token, mask: {"input_ids": token, "labels": token},  # noqa: ARG005
        "labels and mask": lambda token, mask: {"input_ids": token, "attention_mask": mask, "labels": token},
    }
    data: DataLoader[Any] = DataLoader(
        TensorDataset(token, mask), 4, collate_fn=lambda rows: forms[kind](*map(torch.stack, zip(*rows, strict=True)))
    )
    trainer = make(tmp_path)
    other = Trainer(trainer.model, data, data, trainer.optimizer, config=PLAIN, checkpoint_dir=tmp_path)
    assert other.evaluate()["loss"] == pytest.approx(trainer.evaluate()["loss"], rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda logits: {"logits": logits}, Answer])
def test_a_model_may_answer_with_more_than_logits(wrap: Callable[[Tensor], Any], tmp_path: Path) -> None:
    class Wrapped(StandIn):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return wrap(super().forward(input_ids, attention_mask))

    assert make(tmp_path, kind=Wrapped).train() == make(tmp_path).train()


def test_what_is_wrong_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'gradient_clip'; did you mean gradient_clip_norm\?$"):
        make(tmp_path, {"gradient_clip": 1.0})
    with pytest.raises(ConfigError, match=r"^training.learning_rate must be of type float, got 'fast'$"):
        make(tmp_path, {"learning_rate": "fast"})
    whole: DataLoader[Any] = DataLoader(loader().dataset, None)
    with pytest.raises(ValueError, match=r"^batch_size \(2\) must be left out: train_loader makes its batches in its own way$"):
        Trainer(StandIn(), whole, whole, SGD(StandIn().parameters()), config={"batch_size": 2})


def test_a_checkpoint_is_plain_data_of_this_model(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    torch.save(StandIn(), tmp_path / "pickle.pt")
    with pytest.raises(
        CheckpointError,
        match=r"pickle.pt is not a checkpoint that can be loaded safely: it must hold tensors and plain values only",
    ):
        trainer.load_checkpoint(tmp_path / "pickle.pt")
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"weights.pt must be one of a training, it lacks optimizer_states, lr_schedulers"
    ):
        trainer.load_checkpoint(tmp_path / "weights.pt")
    make(tmp_path, kind=lambda: nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB))).save_checkpoint(
        tmp_path / "other.pt"
    )
    with pytest.raises(CheckpointError, match=r"other.pt must fit the model: Unexpected key"):
        trainer.load_checkpoint(tmp_path / "other.pt")
