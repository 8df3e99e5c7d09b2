"""Keep the generators of random numbers in checkpoints."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_modules.data.loader import rank_and_world_size


class RandomState(L.Callback):
    """Resume with the random numbers that an uninterrupted run would have drawn next: with dropout, its very masks.

    A checkpoint holds the states of the generators of torch (CPU, and the GPU in use), numpy and Python of every process, as
    plain values. Each process gets its own back as training starts, after all that set-up may draw. Where the number of
    processes has changed none is put back, and a warning says so; a GPU's is left alone where there was none or is none.

    ``trix`` adds it to every ``fit``.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        """{"processes": one state a process}; with several, each of them has to call it, as Lightning does."""
        _, world_size = rank_and_world_size()
        states: list[Any] = [generator_states()]
        if world_size > 1:
            own, states = states[0], [None] * world_size
            torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["processes"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states, self._restored = self._restored, []
        if len(states) == trainer.world_size:
            put_back(states[trainer.global_rank])
        elif states:
            rank_zero_warn(
                f"number of processes ({trainer.world_size}) differs from the checkpoint's ({len(states)}): "
                "the run goes on with other random numbers and other batches"
            )


def generator_states() -> dict[str, Any]:
    """The states of this process's generators, as plain values."""
    name, key, *place = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _is_on_gpu() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(key).astype(np.int64)), *place],
        "python": random.getstate(),
    }


def put_back(state: dict[str, Any]) -> None:
    """Let the generators go on from what :func:`generator_states` has kept."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and _is_on_gpu():
        torch.cuda.set_rng_state(state["cuda"])
    name, key, *place = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *place))
    random.setstate(state["python"])


def _is_on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
