"""The task of the ResNet-BK model."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_runs import SENTENCE, save_checkpoint

from lightning_modules.commands.surgery import is_equal
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ResNetBKTask
from trix.resnet_bk import LanguageModel, ResNetBKConfig
from trix.resnet_bk.mixer import BirmanSchwingerMixer

SMALL = {"d_model": 16, "n_layers": 2, "n_seq": 16, "n_heads": 2}


def test_its_hyperparameters_make_it_again() -> None:
    task = ResNetBKTask("abcd", ResNetBKConfig(**SMALL, attention_at=(1,), use_scattering_router=False), 3e-3, 5, True)
    again = ResNetBKTask(**task.hparams)
    again.load_state_dict(task.state_dict())
    assert again.hparams == task.hparams
    assert task.hparams["network"]["vocab_size"] == 4
    tokens = torch.randint(0, 4, (2, 9))
    assert torch.equal(again.eval()(tokens), task.eval()(tokens))
    assert isinstance(task.network.stack.mixers[0], BirmanSchwingerMixer)


@pytest.mark.parametrize("use_scattering_router", [True, False])
def test_its_checkpoints_are_read_as_language_models(use_scattering_router: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(SENTENCE * 30)
    data = TextDataModule(path=tmp_path / "text.txt", context_length=8)
    network = ResNetBKConfig(**SMALL, use_scattering_router=use_scattering_router)
    task = ResNetBKTask(data.vocabulary, network)
    path = save_checkpoint(task, data, tmp_path / "trained.ckpt")
    model = LanguageModel.from_checkpoint(path)
    assert asdict(model.config) == task.hparams["network"]
    tokens = torch.randint(0, data.vocab_size, (2, 9))
    assert torch.equal(model(tokens).logits, task.network.eval()(tokens))


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


def test_blocks_that_are_computed_again_keep_less_and_give_the_same_gradients() -> None:
    tokens = torch.randint(0, 4, (2, 17), generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for is_checkpointing in (False, True):
        torch.manual_seed(0)
        task = ResNetBKTask("abcd", ResNetBKConfig(**SMALL), gradient_checkpointing=is_checkpointing)
        task.log = lambda *_, **__: None  # type: ignore[method-assign] (there is no trainer)
        sizes: list[int] = []

        def keep(value: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = task.training_step((tokens[:, :-1], tokens[:, 1:]))["loss"]
        kept.append(sum(sizes))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in task.named_parameters()})
        assert not any("forward" in vars(module) for module in task.modules())
    assert kept[1] < 0.3 * kept[0]
    assert is_equal(gradients[0], gradients[1])


def test_it_refuses_what_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"learning_rate \(0.0\) must be > 0 and finite"):
        ResNetBKTask("ab", learning_rate=0.0)
    with pytest.raises(ValueError, match=r"warmup_steps \(-1\) must be >= 0"):
        ResNetBKTask("ab", warmup_steps=-1)
    with pytest.raises(ValueError, match=r"network.vocab_size \(500\) must be that of the vocabulary \(2\), or be left out"):
        ResNetBKTask("ab", ResNetBKConfig(**SMALL, vocab_size=500))
    with pytest.raises(UserError, match=r"data.context_length \(17\) must be <= network.n_seq \(16\)"):
        ResNetBKTask("ab", ResNetBKConfig(**SMALL)).check_data(TextDataModule(context_length=17))
    with pytest.raises(ValueError, match=r"key \(n_layer\) must be one of the configuration's; the nearest is n_layers"):
        ResNetBKTask("ab", {"n_layer": 2})  # type: ignore[arg-type]
