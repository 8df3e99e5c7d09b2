from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network
from torch import Tensor

from lightning_modules.callbacks import FreezingEvent, FreezingSchedule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig
from trix.nn.ffn import Routing


class SignatureRecorder(L.Callback):
    """The raw signatures in force in layer 0, and what is frozen, as each batch starts its step."""

    def __init__(self) -> None:
        self.raw: list[Tensor] = []
        self.frozen: list[list[bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        layer = routed_layers(pl_module)["layer_0"]
        self.raw.append(layer.get_tile_signatures().clone())
        self.frozen.append([layer.is_frozen(tile) for tile in range(layer.num_tiles)])


def test_frozen_signatures_hold_while_the_others_learn(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    L.seed_everything(0)
    task = LanguageModelTask(text.vocabulary, small_network(), lambda p: torch.optim.SGD(p, lr=100.0), None)
    events = [FreezingEvent("freeze", [0, 2], "all", step=1), FreezingEvent("unfreeze", [2], [0], step=4)]
    recorder = SignatureRecorder()
    callbacks = [recorder, FreezingSchedule(events)]
    make_trainer(max_steps=6, limit_val_batches=0, logger=tensorboard, callbacks=callbacks).fit(task, text)
    expected = [[False] * 4] + [[True, False, True, False]] * 3 + [[True, False, False, False]] * 2
    assert recorder.frozen == expected
    for later in recorder.raw[1:]:
        assert torch.equal(later[0], recorder.raw[0][0])
    assert all(torch.equal(later[2], recorder.raw[0][2]) for later in recorder.raw[1:4])
    assert not torch.equal(recorder.raw[-1][[1, 3]], recorder.raw[0][[1, 3]])
    counts = read_events(tensorboard)
    assert [(event.step, event.value) for event in counts.Scalars("freezing/layer_0")] == [(1, 2.0), (4, 1.0)]
    assert [(event.step, event.value) for event in counts.Scalars("freezing/layer_1")] == [(1, 2.0), (4, 2.0)]


def test_epoch_events_come_with_their_epoch(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    recorder = SignatureRecorder()
    schedule = FreezingSchedule([FreezingEvent("freeze", [1], epoch=1)])
    make_trainer(max_steps=6, limit_val_batches=0, callbacks=[recorder, schedule]).fit(language_model, text)
    assert [frozen[1] for frozen in recorder.frozen] == [False] * 4 + [True] * 2


def test_a_resumed_run_does_not_apply_an_event_again(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    freeze, new = FreezingEvent("freeze", [0], step=1), FreezingEvent("freeze", [3], step=2)
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[FreezingSchedule([freeze])])
    trainer.fit(language_model, text)
    for layer in routed_layers(language_model).values():
        layer.unfreeze_signature(0)  # by hand: only a second application could freeze it again
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    task = LanguageModelTask(text.vocabulary, small_network(), lr_scheduler=None)
    resumed = make_trainer(max_steps=5, limit_val_batches=0, callbacks=[FreezingSchedule([new, freeze])])
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["lr_schedulers"] = []
    torch.save(checkpoint, tmp_path / "a.ckpt")
    resumed.fit(task, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    layer = routed_layers(task)["layer_1"]
    assert [layer.is_frozen(tile) for tile in range(4)] == [False, False, False, True]  # the new event, late, and nothing else


def test_an_event_of_the_step_after_a_checkpoint_is_applied_after_resuming(
    text: TextDataModule, language_model: LanguageModelTask, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    events = [FreezingEvent("freeze", [0], step=2)]
    trainer = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[FreezingSchedule(events)])
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not routed_layers(language_model)["layer_0"].is_frozen(0)
    task = LanguageModelTask(text.vocabulary, small_network())
    resumed = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[FreezingSchedule(events)])
    with pytest.warns(UserWarning, match="max_steps"):
        resumed.fit(task, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert routed_layers(task)["layer_0"].is_frozen(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "melt", "tiles": [0], "step": 1}, r"action \('melt'\) must be 'freeze' or 'unfreeze'"),
        ({"action": "freeze", "tiles": [0]}, r"exactly one of step \(None\) and epoch \(None\)"),
        ({"action": "freeze", "tiles": [0], "step": 1, "epoch": 2}, r"exactly one of step \(1\) and epoch \(2\)"),
        ({"action": "freeze", "tiles": [0], "step": -1}, r"must be >= 0"),
        ({"action": "freeze", "tiles": [], "step": 1}, r"number of tiles \(0\) must be >= 1"),
        ({"action": "freeze", "tiles": [0, -1], "step": 1}, r"tiles \(0, -1\) must be >= 0"),
        ({"action": "freeze", "tiles": [1, 1], "step": 1}, r"tiles \(1, 1\) must be distinct"),
        ({"action": "freeze", "tiles": [1], "layers": [], "step": 1}, r"number of layers \(0\) must be >= 1"),
    ],
)
def test_events_are_checked_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreezingEvent(**arguments)


def test_schedules_are_checked_when_made() -> None:
    event = FreezingEvent("freeze", [0], step=1)
    with pytest.raises(ValueError, match=r"number of events \(0\) must be >= 1"):
        FreezingSchedule([])
    with pytest.raises(ValueError, match=r"events\[1\] .* must not repeat events\[0\]"):
        FreezingSchedule([event, FreezingEvent("freeze", [0], step=1)])


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (FreezingEvent("freeze", [4], step=1), r"tile \(4\) must be < num_tiles \(4\) of layer 0"),
        (FreezingEvent("freeze", [0], [2], step=1), r"layer \(2\) must be < number of routed layers \(2\)"),
    ],
)
def test_events_are_checked_against_the_network(
    event: FreezingEvent, message: str, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(callbacks=[FreezingSchedule([event])]).fit(language_model, text)


@pytest.mark.parametrize(("routing", "router"), [("learned", "LearnedRouter"), ("hash", "HashRouter")])
def test_a_router_without_signatures_has_nothing_to_freeze(routing: Routing, router: str, text: TextDataModule) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=4, routing=routing)))
    with pytest.raises(UserError, match=rf"the router \({router}\) of layer 0 has no signatures"):
        FreezingSchedule([FreezingEvent("freeze", [0], step=1)]).check_network(task)
