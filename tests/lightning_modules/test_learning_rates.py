"""scale_rates: every rate that a schedule gives after it is the old one times the factor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.learning_rates import scale_rates

MAKERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 12, eta_min=0.01),
    "step": lambda optimizer: schedules.StepLR(optimizer, 3),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, 0.5, 12),
    "cyclic": lambda optimizer: schedules.CyclicLR(optimizer, 0.1, 0.4, 3),
    "sequential": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.1), schedules.LambdaLR(optimizer, lambda step: 0.9**step)], [7]
    ),
}


def rates(make: Callable[[Optimizer], LRScheduler] | None, factor: float, at: int = 4) -> list[float]:
    """The rates of 12 steps of two groups; scaled after the step `at`, the rates before it at once."""
    weight = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": weight[:1]}, {"params": weight[1:], "lr": 0.02}]
    optimizer = SGD(groups, lr=0.2, momentum=0.9)
    scheduler = None if make is None else make(optimizer)
    seen = []
    for step in range(12):
        seen += [group["lr"] * (factor if step < at else 1.0) for group in optimizer.param_groups]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step == at - 1:
            scale_rates(optimizer, [] if scheduler is None else [scheduler], factor)
    return seen


@pytest.mark.parametrize("name", MAKERS)
def test_a_schedule_keeps_its_shape(name: str) -> None:
    assert rates(MAKERS[name], 0.5) == pytest.approx([rate / 2 for rate in rates(MAKERS[name], 1.0)])


def test_without_a_schedule_the_optimizer_keeps_the_rate() -> None:
    assert rates(None, 0.5) == [0.1, 0.01] * 12
