"""Run `trix` and die by SIGKILL at a training step: python killed_run.py STEP MOMENT COMMAND OPTIONS

MOMENT: "step", as the step begins; or "checkpoint", half-way through the writing of the first checkpoint from that step on.
"""

import io
import os
import signal
import sys
from typing import Any

import torch

from lightning_modules.cli import main
from lightning_modules.tasks import RoutedTask


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(last_step: int) -> None:
    training_step = RoutedTask.training_step

    def step_or_die(self: RoutedTask, batch: Any) -> Any:
        if self.global_step == last_step:
            die()
        return training_step(self, batch)

    RoutedTask.training_step = step_or_die  # type: ignore[method-assign]


def die_in_checkpoint(first_step: int) -> None:
    save = torch.save

    def save_or_die(value: Any, file: Any) -> None:
        if value["global_step"] < first_step:
            save(value, file)
            return
        content = io.BytesIO()
        save(value, content)
        file.write(content.getvalue()[: len(content.getvalue()) // 2])
        file.flush()
        die()

    torch.save = save_or_die


if __name__ == "__main__":
    {"step": die_at_step, "checkpoint": die_in_checkpoint}[sys.argv[2]](int(sys.argv[1]))
    sys.exit(main(sys.argv[3:]))
