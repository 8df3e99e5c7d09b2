"""Loaders shared by the DataModules: training batches that resume exactly, evaluation batches in order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.errors import DataError

BatchT = TypeVar("BatchT")


class ResumableLoader(Generic[BatchT]):
    """Serve `make_batch(epoch, batch_idx)` for batch_idx in [0, num_batches), and remember the place.

    Since a batch is a function of its place alone, the state is two integers, and a run resumed in the middle of
    an epoch sees exactly the batches that an uninterrupted one would have seen. Lightning stores the state in the
    checkpoint (`state_dict`, `load_state_dict`).

    The epoch is settled when an iterator serves its first batch: `trainer.current_epoch` where there is a trainer
    (Lightning does not restore the loader from every end-of-epoch checkpoint, and the epoch it announces to samplers
    runs ahead after some, while `current_epoch` was right after all), else one more than the last iterator's.

    Args:
        make_batch: pure function of (epoch, batch_idx), both counted from 0.
        num_batches: length of an epoch, >= 1.
        settings: plain values that `make_batch` depends on; a run resumed with other values is warned.
        trainer: its epoch counts; with `overfit_batches` every epoch serves the batches of epoch 0.
    """

    def __init__(
        self,
        make_batch: Callable[[int, int], BatchT],
        num_batches: int,
        settings: Mapping[str, int | str],
        trainer: L.Trainer | None = None,
    ) -> None:
        self._make_batch = make_batch
        self._num_batches = num_batches
        self._settings = dict(settings)
        self._trainer = trainer
        self._epoch = 0
        self._num_served = 0
        # True while (epoch, num_served) says where the next iterator starts; False once an iterator took it up.
        self._is_placed = True

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[BatchT]:
        # A generator: nothing moves until the first batch is asked for, so an iterator made and dropped costs no epoch.
        self._settle_epoch()
        while self._num_served < self._num_batches:
            batch_idx = self._num_served
            # Counted before the batch is handed out: a checkpoint taken while it is in use names the one after it.
            self._num_served += 1
            yield self._make_batch(0 if self._is_overfitting else self._epoch, batch_idx)

    def _settle_epoch(self) -> None:
        if self._trainer is not None:
            epoch = self._trainer.current_epoch
        else:
            epoch = self._epoch if self._is_placed else self._epoch + 1
        if epoch != self._epoch or not self._is_placed:
            self._epoch, self._num_served = epoch, 0
        self._is_placed = False

    @property
    def _is_overfitting(self) -> bool:
        # Lightning sets the attribute without declaring it.
        return getattr(self._trainer, "overfit_batches", 0) > 0

    def state_dict(self) -> dict[str, Any]:
        """The place and the settings, as plain values."""
        return {"epoch": self._epoch, "num_served": self._num_served, "settings": dict(self._settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iterator at the stored place; after a whole epoch, at the head of the next one."""
        self._epoch, self._num_served = int(state["epoch"]), int(state["num_served"])
        if self._num_served >= self._num_batches:
            self._epoch, self._num_served = self._epoch + 1, 0
        self._is_placed = True
        stored = state["settings"]
        changed = [
            f"{name} is {value}, was {stored.get(name)}" for name, value in self._settings.items() if value != stored.get(name)
        ]
        if changed:
            rank_zero_warn(
                "The data settings differ from the checkpoint's, so the batches differ from those of an "
                f"uninterrupted run: {'; '.join(changed)}"
            )


def permuted_loader(
    input_N: Tensor,
    label_N: Tensor,
    noun: str,
    batch_size: int,
    seed: int,
    settings: Mapping[str, int | str],
    trainer: L.Trainer | None,
) -> ResumableLoader[tuple[Tensor, Tensor]]:
    """Whole batches of each epoch's permutation, `numpy.random.default_rng((seed, epoch))`; each process takes its own part.

    Args:
        noun: what the examples are, in the plural. settings: what, besides the sizes and the seed, must be equal on
            resuming.

    Raises:
        DataError: fewer examples than one batch of all processes.
    """
    rank, world_size = rank_and_world_size()
    num_examples = len(label_N)
    num_batches = num_examples // (batch_size * world_size)
    if num_batches == 0:
        raise DataError(f"batch_size * processes ({batch_size} * {world_size}) must be <= training {noun} ({num_examples})")

    def make_batch(epoch: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        order_N = np.random.default_rng((seed, epoch)).permutation(num_examples)
        head = (batch_idx * world_size + rank) * batch_size
        chosen_B = torch.from_numpy(order_N[head : head + batch_size])
        return input_N[chosen_B], label_N[chosen_B]

    sizes = {f"num_{noun}": num_examples, "seed": seed, "batch_size": batch_size, "world_size": world_size}
    return ResumableLoader(make_batch, num_batches, settings={**settings, **sizes}, trainer=trainer)


def evaluation_loader(input_N: Tensor, target_N: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Every (input, target) pair once, in order; the last batch may be smaller.

    Of several processes each takes every world_size-th pair, none twice: what is measured is what one process measures. All
    have the same number of batches, for which batch_size grows a little where it must.
    """
    dataset = TensorDataset(input_N, target_N)
    rank, world_size = rank_and_world_size()
    sampler = None
    if world_size > 1:
        num_least, num_longer = divmod(len(dataset), world_size)
        if num_least == 0:
            raise DataError(f"number of processes ({world_size}) must be <= examples to evaluate ({len(dataset)})")
        # One process would have a batch more than another, which must not wait for it.
        while num_longer and num_least % batch_size == 0:
            batch_size += 1
        # Lightning's own, which it would put here for predictions only; else it repeats pairs to make the parts equal.
        sampler = UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False)
    # An iterator draws a seed. From a generator of its own, so that validating more or less often leaves the training as it is:
    # Lightning does not catch up on a validation that was due when the checkpoint was written.
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, generator=torch.Generator())


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) outside a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
