"""The keys and classes that a configuration may name: the errors about a misspelt name suggest one of these."""

import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import get_args, get_type_hints

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.callbacks.report_page import ReportPage
from lightning_modules.tasks import TrixTask


def class_names() -> set[str]:
    return {kind.__name__ for base in (TrixTask, L.LightningDataModule, Callback) for kind in _subclasses(base)}


def _subclasses(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def known_keys() -> set[str]:
    """The parameters of the trainer and of this project's classes, dotted as on the command line, for corrections."""
    keys = {"seed_everything", "ckpt_path", "config", "resume"} | {
        f"trainer.{key}" for key in inspect.signature(L.Trainer).parameters
    }
    keys |= {f"model.{key}" for task in _subclasses(TrixTask) for key in _parameters(task)}
    keys |= {f"report.{key}" for key in _parameters(ReportPage)}
    keys |= {f"data.{key}" for kind in _subclasses(L.LightningDataModule) for key in _parameters(kind)}
    project_callbacks = [kind for kind in _subclasses(Callback) if kind.__module__.startswith("lightning_modules.")]
    return keys | {f"trainer.callbacks.{key}" for kind in project_callbacks for key in _parameters(kind)}


def _parameters(kind: type) -> Iterator[str]:
    """Names of the parameters of a class, and of the dataclasses among them: ``network``, ``network.d_model``, ..."""
    try:
        hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # those of a user's own class may be for type checkers alone
        hints = {}
    for name in inspect.signature(kind).parameters:
        yield name
        for hint in (hints.get(name), *get_args(hints.get(name))):
            if isinstance(hint, type) and is_dataclass(hint):
                yield from (f"{name}.{inner}" for inner in _parameters(hint))
