import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network

from lightning_modules.callbacks import DiversityMonitor
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig, TriXFFN


def test_logs_the_diversity_of_each_layer_at_its_own_pace(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    trainer = make_trainer(max_steps=4, logger=tensorboard, log_every_n_steps=50, callbacks=[DiversityMonitor(0.0, 2)])
    trainer.fit(language_model, text)
    events = read_events(tensorboard)
    values = [layer.get_signature_diversity() for layer in routed_layers(language_model).values()]
    assert [event.step for event in events.Scalars("diversity/layer_0")] == [2, 4]
    assert events.Scalars("diversity/layer_1")[-1].value == pytest.approx(values[1])
    assert events.Scalars("diversity/mean")[-1].value == pytest.approx(sum(values) / 2)
    assert trainer.callback_metrics["diversity/mean"] == pytest.approx(sum(values) / 2)  # for EarlyStopping


def test_warns_once_until_a_layer_recovers(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    monitor = DiversityMonitor(threshold=0.4, every_n_steps=1)
    layer = routed_layers(language_model)["layer_1"]
    apart = layer.router.raw_signatures.detach().clone()

    def messages() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(max_steps=2, limit_val_batches=0, callbacks=[monitor]).fit(language_model, text)
        return [str(warning.message) for warning in caught if "diversity" in str(warning.message)]

    assert messages() == []
    with torch.no_grad():
        layer.router.raw_signatures.copy_(apart[:1].expand_as(apart))
    assert len(messages()) == 1
    resumed = DiversityMonitor(threshold=0.4, every_n_steps=1)
    resumed.load_state_dict(monitor.state_dict())
    monitor = resumed
    assert messages() == []  # still low: said already
    with torch.no_grad():
        layer.router.raw_signatures.copy_(apart)
    assert messages() == []
    with torch.no_grad():
        layer.router.raw_signatures.copy_(apart[:1].expand_as(apart))
    assert messages()[0].startswith("signature diversity of layer_1 (0.0")


def collapse(layer: TriXFFN) -> torch.Tensor:
    """Make all signatures of a layer equal; returns the raw ones before."""
    apart = layer.router.raw_signatures.detach().clone()
    with torch.no_grad():
        layer.router.raw_signatures.copy_(apart[:1].expand_as(apart))
    return apart


def steady_task(text: TextDataModule, diversity_weight: float = 0.0) -> LanguageModelTask:
    """Without learning: only a callback moves a signature."""
    L.seed_everything(0)
    network = small_network(ffn=FFNConfig(num_tiles=4, diversity_weight=diversity_weight))
    return LanguageModelTask(text.vocabulary, network, lambda p: torch.optim.SGD(p, lr=0.0), None)


def test_medium_raises_the_weight_while_diversity_is_low_and_lets_it_fall_to_what_it_was(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    task, monitor = steady_task(text, 0.03), DiversityMonitor(every_n_steps=1, level="medium", max_weight=0.2)
    layers = routed_layers(task)
    apart = collapse(layers["layer_1"])

    def weights(steps: int) -> list[float]:
        seen: list[float] = []

        class Recorder(L.Callback):
            def on_train_batch_end(self, *rest: Any) -> None:
                seen.append(layers["layer_1"].diversity_weight)

        callbacks = [monitor, Recorder()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer(max_steps=steps, limit_val_batches=0, logger=tensorboard, callbacks=callbacks).fit(task, text)
        return seen

    assert weights(4) == pytest.approx([0.06, 0.12, 0.2, 0.2])
    with torch.no_grad():
        layers["layer_1"].router.raw_signatures.copy_(apart)
    assert weights(4) == pytest.approx([0.1, 0.05, 0.03, 0.03])
    assert layers["layer_0"].diversity_weight == 0.03
    assert torch.equal(layers["layer_1"].router.raw_signatures, apart)
    assert read_events(tensorboard).Scalars("diversity_weight/layer_0")[-1].value == pytest.approx(0.03)


def test_the_weight_of_medium_survives_a_checkpoint_and_soft_touches_nothing(
    text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    task = steady_task(text)
    collapse(routed_layers(task)["layer_0"])
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[DiversityMonitor(1.0, 1, "medium")])
    with pytest.warns(UserWarning, match="fell below"):
        trainer.fit(task, text)
    raised = routed_layers(task)["layer_0"].diversity_weight
    assert raised == pytest.approx(0.04)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    for level, expected in (("medium", 2 * raised), ("soft", 0.0)):
        other = steady_task(text)
        resumed = make_trainer(max_steps=4, limit_val_batches=0, callbacks=[DiversityMonitor(1.0, 1, level)])
        resumed.fit(other, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        assert routed_layers(other)["layer_0"].diversity_weight == pytest.approx(expected)


@pytest.mark.parametrize("level", ["soft", "hard"])
def test_hard_alone_draws_collapsed_tiles_anew_and_resets_what_the_optimizer_remembers(
    level: Literal["soft", "hard"], text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    L.seed_everything(0)
    task = LanguageModelTask(text.vocabulary, small_network(), lr_scheduler=None)
    layer = routed_layers(task)["layer_1"]
    collapse(layer)
    layer.freeze_signature(2)
    kept = layer.get_tile_signatures()[2]
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[DiversityMonitor(0.4, 1, level)])
    with pytest.warns(UserWarning, match="signature diversity of layer_1"):
        trainer.fit(task, text)
    moment = trainer.optimizers[0].state[layer.tiles.up.weight]["exp_avg"]
    history = [entry for entry in layer.get_surgery_history() if entry["operation"] == "reseed"]
    assert torch.equal(layer.get_tile_signatures()[2], kept)
    assert routed_layers(task)["layer_0"].get_surgery_history() == []
    if level == "soft":
        assert moment[0].any()  # the tile that all tokens went to
        assert history == []
    else:
        assert layer.get_signature_diversity() > 0.4
        assert [entry["tile_idx"] for entry in history] == [0, 1, 3]
        assert {entry["tag"] for entry in history} == {"diversity"}
        assert not moment[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, r"threshold \(1.5\) must be in \[0, 1\]"),
        ({"every_n_steps": 0}, r"every_n_steps \(0\) must be >= 1"),
        ({"level": "loud"}, r"level \('loud'\) must be 'soft', 'medium' or 'hard'"),
        ({"max_weight": 0.0}, r"max_weight \(0.0\) must be > 0"),
        ({"min_difference": 1.0}, r"min_difference \(1.0\) must be >= 0 and < 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiversityMonitor(**arguments)
