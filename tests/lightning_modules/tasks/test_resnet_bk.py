"""The task of the ResNet-BK model."""

import math

import pytest
import torch

from lightning_modules.tasks import ResNetBKTask
from trix.resnet_bk import ResNetBKConfig
from trix.resnet_bk.mixer import BirmanSchwingerMixer

SMALL = {"d_model": 16, "n_layers": 2, "n_seq": 16, "n_heads": 2}


def test_its_hyperparameters_make_it_again() -> None:
    task = ResNetBKTask("abcd", ResNetBKConfig(**SMALL, attention_at=(1,), use_scattering_router=False), 3e-3, 5)
    again = ResNetBKTask(**task.hparams)
    again.load_state_dict(task.state_dict())
    assert again.hparams == task.hparams
    assert task.hparams["network"]["vocab_size"] == 4
    tokens = torch.randint(0, 4, (2, 9))
    assert torch.equal(again.eval()(tokens), task.eval()(tokens))
    assert isinstance(task.network.stack.mixers[0], BirmanSchwingerMixer)


def test_the_rate_rises_and_then_falls_along_half_a_cosine() -> None:
    task = ResNetBKTask("abcd", ResNetBKConfig(**SMALL), learning_rate=0.5, warmup_steps=4)
    optimizer, scheduler = task.make_optimizer(20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    cosine = [0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates == pytest.approx([min(1, (step + 1) / 5) * value for step, value in enumerate(cosine)])


def test_it_refuses_what_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"learning_rate \(0.0\) must be > 0 and finite"):
        ResNetBKTask("ab", learning_rate=0.0)
    with pytest.raises(ValueError, match=r"warmup_steps \(-1\) must be >= 0"):
        ResNetBKTask("ab", warmup_steps=-1)
    with pytest.raises(ValueError, match=r"key \(n_layer\) must be one of the configuration's; the nearest is n_layers"):
        ResNetBKTask("ab", {"n_layer": 2})  # type: ignore[arg-type]
