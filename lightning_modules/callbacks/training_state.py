"""What a training step changes, kept in memory."""

from copy import deepcopy
from typing import Any

import lightning as L

from lightning_modules.callbacks.random_state import generator_states, put_back


class TrainingState:
    """A copy of what a training step changes, to be put back where the step has gone wrong.

    These are the states of the module, of optimizers, schedules and gradient scaler, and the generators of random numbers. It
    takes as much memory as they do, on their device.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        parts: list[Any] = [pl_module, *trainer.optimizers, *schedulers, trainer.precision_plugin]
        self._states = [(part, deepcopy(part.state_dict())) for part in parts]
        self._generators = generator_states()

    def restore(self) -> None:
        """Put everything back; once only, as optimizers take over the tensors that they are given."""
        for part, state in self._states:
            part.load_state_dict(state)
        put_back(self._generators)
