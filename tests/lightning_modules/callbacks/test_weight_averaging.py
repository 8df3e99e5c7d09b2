"""Lightning's averages of weights leave alone what is held in a layer: in the run, in its checkpoint, after a resume."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from small_runs import MakeTrainer, small_network
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_modules.callbacks import SurgeryEvent, SurgerySchedule
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask

SIGNS = "-+0-" * 4
SIGNATURE = torch.tensor([-1.0, 1.0, 0.0, -1.0] * 4)
LAYER = "network.stack.blocks.1.feed_forward.inner"
EVENTS = [
    SurgeryEvent("insert", [3], step=3, signature=SIGNS, tag="concept"),
    SurgeryEvent("freeze", [0], step=5),
    SurgeryEvent("unfreeze", [0], step=8),
]
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.99),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.99, use_buffers=False),
    "late ema": lambda: EMAWeightAveraging(decay=0.99, update_every_n_steps=3, update_starting_at_step=5),
    "plain": lambda: WeightAveraging(),
    "own": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
}


class FrozenInValidation(L.Callback):
    """By validation: the signature of tile 3 of layer 1, and which tiles are frozen."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Tensor, list[int]]] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        layer = routed_layers(pl_module)["layer_1"]
        frozen = [tile for tile in range(layer.num_tiles) if layer.is_frozen(tile)]
        self.found.append((trainer.global_step, layer.get_tile_signatures()[3], frozen))


def facts_of(state: dict[str, Any]) -> dict[str, Tensor]:
    names = ("is_frozen_E", "frozen_value_ED", "is_free_E", "log_mass_E", "num_raised", "step", "_extra_state")
    return {key: value for key, value in state.items() if key.endswith(names)}


def check_both_copies(checkpoint: dict[str, Any]) -> None:
    average, trained = facts_of(checkpoint["state_dict"]), facts_of(checkpoint["current_model_state"])
    assert len(average) == 2 * 7
    assert [key for key, value in trained.items() if not torch.equal(value, average[key])] == []
    assert trained[f"{LAYER}.router.is_frozen_E"].tolist() == [False, False, False, True]
    assert torch.equal(trained[f"{LAYER}.router.frozen_value_ED"][3].float(), SIGNATURE)
    assert int(trained[f"{LAYER}.surgery_log.step"]) == checkpoint["global_step"]
    key = f"{LAYER}.router.raw_signatures"
    assert not torch.equal(checkpoint["state_dict"][key], checkpoint["current_model_state"][key])


@pytest.mark.parametrize("way", AVERAGES)
def test_the_average_holds_what_the_trained_network_holds(
    way: str, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    watch, saver = FrozenInValidation(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    events = SurgerySchedule([*EVENTS, SurgeryEvent("freeze", [1], step=14)])
    callbacks = [AVERAGES[way](), events, watch, saver]
    settings: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    settings |= {"enable_checkpointing": True, "num_sanity_val_steps": 1}
    task = LanguageModelTask(text.vocabulary, small_network())
    make_trainer(max_steps=10, callbacks=callbacks, **settings).fit(task, text)
    assert [step for step, _, _ in watch.found] == [0, 2, 4, 6, 8, 10]
    for step, signature_D, frozen in watch.found:
        assert torch.equal(signature_D, SIGNATURE) or step < 4
        assert frozen == {0: [], 2: [], 4: [3], 6: [0, 3], 8: [0, 3], 10: [3]}[step]
    assert torch.equal(routed_layers(task)["layer_1"].get_tile_signatures()[3], SIGNATURE)  # now with the averaged weights

    path = tmp_path / "step=10.ckpt"
    check_both_copies(torch.load(path, weights_only=True))

    average, resumed = AVERAGES[way](), LanguageModelTask(text.vocabulary, small_network())
    settings |= {"max_steps": 20, "callbacks": [average, SurgerySchedule(events.events), saver]}
    make_trainer(**settings).fit(resumed, text, ckpt_path=path, weights_only=True)
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    average_facts, trained_facts = facts_of(checkpoint["state_dict"]), facts_of(checkpoint["current_model_state"])
    assert [key for key, value in trained_facts.items() if not torch.equal(value, average_facts[key])] == []
    assert average_facts[f"{LAYER}.router.is_frozen_E"].tolist() == [False, True, False, True]
    layer = routed_layers(resumed)["layer_1"]
    assert torch.equal(layer.get_tile_signatures()[3], SIGNATURE)
    assert [entry["operation"] for entry in layer.get_surgery_history()] == ["insert", "freeze", "unfreeze", "freeze"]


def test_stochastic_weight_averaging_holds_it_too(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    task = LanguageModelTask(text.vocabulary, small_network())
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = make_trainer(max_steps=-1, max_epochs=4, callbacks=[average, SurgerySchedule(EVENTS)], limit_train_batches=4)
    task._make_lr_scheduler = None
    trainer.fit(task, text)
    layer = routed_layers(task)["layer_1"]
    assert [layer.is_frozen(tile) for tile in range(4)] == [False, False, False, True]
    assert torch.equal(layer.get_tile_signatures()[3], SIGNATURE)
    assert int(layer.surgery_log.step) == trainer.global_step == 16
