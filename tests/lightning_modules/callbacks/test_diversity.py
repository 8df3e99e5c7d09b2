import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import MakeTrainer, read_events

from lightning_modules.callbacks import DiversityMonitor
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, r"threshold \(1.5\) must be in \[0, 1\]"),
        ({"every_n_steps": 0}, r"every_n_steps \(0\) must be >= 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiversityMonitor(**arguments)
