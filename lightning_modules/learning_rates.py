"""The learning rate of a run: changed for good, whatever its schedule; and how far the schedule has lowered it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PEAK = "highest_lr"
# Where optimizers and the schedules of torch keep learning rates, in their states.
_RATES = frozenset(
    {PEAK, "lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr", "default_min_lr"}
)


def scale_rates(optimizer: Optimizer, schedulers: Iterable[LRScheduler], factor: float) -> None:
    """Multiply every learning rate of the optimizer, and all that its schedules will give it from now on, by factor.

    Nested schedules are followed. The states of both keep the change, so a checkpoint does, too.
    """
    for group in optimizer.param_groups:
        group.update({name: _scaled(value, factor) for name, value in group.items() if name in _RATES})
    for scheduler in schedulers:
        scheduler.load_state_dict(_with_scaled_rates(scheduler.state_dict(), factor))


def share_of_peak(optimizers: Iterable[Optimizer]) -> float:
    """The present learning rate as a part of the highest so far, in [0, 1]; the largest over all groups of parameters.

    Each group keeps its highest rate under PEAK: call this once before every training step. So it stands in every checkpoint,
    and :func:`scale_rates` leaves the share as it is. 1 where the rate has not fallen, or all rates are 0.
    """
    shares = []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = float(group["lr"])
        group[PEAK] = max(rate, group.get(PEAK, 0.0))
        if group[PEAK] > 0.0:
            shares.append(rate / group[PEAK])
    return max(shares, default=1.0)


def _with_scaled_rates(state: Any, factor: float) -> Any:
    if isinstance(state, Mapping):
        return {
            name: _scaled(value, factor) if name in _RATES else _with_scaled_rates(value, factor)
            for name, value in state.items()
        }
    if type(state) is list:
        return [_with_scaled_rates(value, factor) for value in state]
    return state


def _scaled(rate: Any, factor: float) -> Any:
    if isinstance(rate, list | tuple):
        return type(rate)(_scaled(value, factor) for value in rate)
    return rate * factor if isinstance(rate, int | float | Tensor) else rate
