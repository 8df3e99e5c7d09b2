"""The step of the balance bias is lowered with the learning rate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import MakeTrainer, small_network
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_modules.data.text import TextDataModule
from lightning_modules.learning_rates import scale_rates, share_of_peak
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig


class Factors(L.Callback):
    """Notes what the steps of the first layer's bias are multiplied by, and the bias after each."""

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.bias: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        router = routed_layers(pl_module)["layer_0"].router
        self.factors.append(float(router.step_factor))
        self.bias.append(router.balance_bias.clone())


def task(text: TextDataModule, **settings: Any) -> LanguageModelTask:
    L.seed_everything(0)
    return LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=4, balance_rate=0.25)), **settings)


HALF_COSINE = [1.0, 0.8535534, 0.5, 0.1464466]


def test_a_schedule_that_ends_at_0_ends_at_rest(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    noted, model = Factors(), task(text)
    make_trainer(max_steps=4, callbacks=[noted]).fit(model, text)
    assert noted.factors == pytest.approx(HALF_COSINE)
    moves = [(after - before).abs().max() for before, after in zip([torch.zeros(4), *noted.bias], noted.bias, strict=False)]
    assert moves == pytest.approx([0.25 * factor for factor in HALF_COSINE])
    router = routed_layers(model)["layer_0"].router
    assert router.step_factor == 1.0  # for whoever trains the network after it
    assert router.balance_age_E.tolist() == pytest.approx([sum(HALF_COSINE)] * 4)


def test_a_resumed_run_goes_on_with_the_same_steps(text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole, half, rest = Factors(), Factors(), Factors()
    make_trainer(max_steps=4, callbacks=[whole]).fit(task(text), text)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    make_trainer(max_steps=4, callbacks=[half, Save()]).fit(task(text), text)
    make_trainer(max_steps=4, callbacks=[rest]).fit(task(text), text, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.factors == whole.factors[2:]
    assert torch.equal(rest.bias[-1], whole.bias[-1])


def test_without_a_schedule_the_step_stays(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    noted = Factors()
    make_trainer(max_steps=3, callbacks=[noted]).fit(task(text, lr_scheduler=None), text)
    assert noted.factors == [1.0] * 3


def warm_up(optimizer: Optimizer) -> LRScheduler:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.25, total_iters=2), ConstantLR(optimizer, 0.5)], [2])


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.4, total_steps=5, pct_start=0.4, anneal_strategy="linear")


def noam(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.01 * min((step + 1) / 2, ((step + 1) / 2) ** -0.5))


@pytest.mark.parametrize("make", [warm_up, one_cycle, noam])
def test_the_share_is_that_of_the_highest_rate_so_far(make: Callable[[Optimizer], LRScheduler]) -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    scheduler, shares, rates = make(optimizer), list[float](), list[float]()
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        shares.append(share_of_peak([optimizer]))
        optimizer.step()
        scheduler.step()
    assert shares == pytest.approx([rate / max(rates[: step + 1]) for step, rate in enumerate(rates)])
    assert shares[0] == shares[1] == 1.0
    assert shares[3] < 1.0


def test_a_rate_that_a_plateau_lowers_counts_and_one_that_a_recovery_halves_does_not() -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    plateau = ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    assert share_of_peak([optimizer]) == 1.0
    scale_rates(optimizer, [], 0.5)
    assert share_of_peak([optimizer]) == 1.0
    plateau.step(1.0)
    plateau.step(1.0)
    assert share_of_peak([optimizer]) == pytest.approx(0.25)
    other = SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    other.load_state_dict(optimizer.state_dict())
    assert share_of_peak([other]) == pytest.approx(0.25)


def test_the_share_is_the_largest_of_all_groups_and_1_where_nothing_is_known() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = AdamW([{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "lr": 0.0}], lr=0.1)
    assert share_of_peak([optimizer]) == share_of_peak([]) == 1.0
    optimizer.param_groups[0]["lr"] = 0.025
    assert share_of_peak([optimizer]) == pytest.approx(0.25)
    assert share_of_peak([SGD(first.parameters(), lr=0.0)]) == 1.0
