"""What is logged of the operators of resolvent mixers."""

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import MakeTrainer, small_network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.callbacks import ResolventMonitor
from lightning_modules.callbacks.resolvent_monitor import _read
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import LanguageModelTask
from trix.nn import ResolventMixer


def test_scalars_and_a_histogram_reach_tensorboard(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(mixer="resolvent"))
    make_trainer(
        max_steps=2, val_check_interval=1, limit_val_batches=2, logger=tensorboard, callbacks=[ResolventMonitor()]
    ).fit(task, text)
    assert not any(module._forward_pre_hooks for module in task.network.modules())
    events = EventAccumulator(tensorboard.log_dir)
    events.Reload()
    layers = range(len(task.network.stack.blocks))
    for layer in layers:
        assert [0 < event.value <= 1 for event in events.Scalars(f"resolvent/layer_{layer}/g_eta")] == [True, True]
        assert len(events.Scalars(f"resolvent/layer_{layer}/spectral_shift")) == 2
        histogram = events.Histograms(f"resolvent/layer_{layer}/phase")[-1].histogram_value
        assert 0 < histogram.min <= histogram.max < math.pi


@pytest.mark.parametrize("hopping", ["hermitian", "one_way"])
def test_the_shift_is_that_of_the_potential_and_padding_has_none(hopping: str) -> None:
    torch.manual_seed(0)
    mixer = ResolventMixer(24, 4, hopping=hopping).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(mixer.dynamics.weight, std=0.1)  # one-way hopping starts without a potential
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    metrics, phase = _read(mixer, x, None)
    padded = torch.cat([torch.randn(2, 5, 24, dtype=torch.float64), x], dim=1)
    mask = torch.arange(35).expand(2, 35) >= 5
    for name, value in _read(mixer, padded, mask)[0].items():
        torch.testing.assert_close(value, metrics[name], msg=name)
    torch.testing.assert_close(_read(mixer, padded, mask)[1], phase.flatten())
    assert metrics["spectral_shift"] > 0.01
    with torch.no_grad():
        mixer.dynamics.weight.zero_()
    assert _read(mixer, x, None)[0]["spectral_shift"] < 1e-9  # equal tokens behind an open end: no potential


def test_a_network_without_a_resolvent_is_refused(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    task = LanguageModelTask(text.vocabulary, small_network())
    with pytest.raises(UserError, match=r"ResolventMonitor needs a network with a resolvent mixer"):
        make_trainer(max_steps=1, callbacks=[ResolventMonitor()]).fit(task, text)
