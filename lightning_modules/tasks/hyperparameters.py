"""Whether a checkpoint can rebuild a task or data: what it keeps of them is their hyperparameters."""

import inspect
from typing import Any

import lightning as L

from lightning_modules.errors import UserError

_SAVE = "self.save_hyperparameters({...}) with plain values, as docs/how-to/own-task.md shows"


def check_hyperparameters(part: L.LightningModule | L.LightningDataModule) -> None:
    """Raise UserError unless the hyperparameters are plain values, and enough to call the part's class with them."""
    kind, settings = type(part).__name__, dict(part.hparams)
    for name, value in settings.items():
        if (found := _not_plain(value)) is not None:
            raise UserError(f"hyperparameter {name} of {kind} ({type(found).__name__}) must be a plain value: {_SAVE}")
    parameters = inspect.signature(type(part)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if is_needed and name not in settings:
            raise UserError(f"hyperparameters of {kind} must hold {name}, so that a checkpoint can rebuild it: {_SAVE}")
    for name in settings:
        if name not in parameters and not takes_any:
            raise UserError(f"hyperparameter {name} of {kind} must be a parameter of its __init__: {_SAVE}")


def _not_plain(value: Any) -> Any:
    """The first value that no checkpoint can hold; None where all are plain."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return None
    if type(value) in (list, tuple):
        return next((found for one in value if (found := _not_plain(one)) is not None), None)
    if isinstance(value, dict):
        return next((found for one in (*value, *value.values()) if (found := _not_plain(one)) is not None), None)
    return value
