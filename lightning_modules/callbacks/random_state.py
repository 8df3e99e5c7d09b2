"""Keep the generators of random numbers in checkpoints."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from typing_extensions import override


class RandomState(L.Callback):
    """Resume with the random numbers that an uninterrupted run would have drawn next: with dropout, its very masks.

    A checkpoint holds the states of the generators of torch (CPU and every GPU), numpy and Python, as plain values. They are
    put back as training starts, after all that set-up may draw. A GPU's is left alone where the number of GPUs has changed.
    With several processes a checkpoint has the state of the first one only, which must not become that of all: none is put
    back, and a resumed run with dropout then draws other masks.

    ``trix`` adds it to every ``fit``.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        name, key, *place = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [str(name), torch.from_numpy(np.asarray(key).astype(np.int64)), *place],
            "python": random.getstate(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state, self._restored = self._restored, None
        if state is None or trainer.world_size > 1:
            return
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        name, key, *place = state["numpy"]
        np.random.set_state((name, key.numpy().astype(np.uint32), *place))
        random.setstate(state["python"])
