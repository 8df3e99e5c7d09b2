"""Pack and unpack whole models."""

from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@runtime_checkable
class Packable(Protocol):
    """A module with a 2-bit form. Both methods are idempotent."""

    def pack(self) -> None: ...
    def unpack(self) -> None: ...


def pack_model(model: ModuleT) -> ModuleT:
    """Pack every module that can be, in place; returns the model, for inference only. Its state_dict loads back."""
    # Parents come first: a routed layer reads its signatures from its tiles before they drop their float weights.
    for module in model.modules():
        if isinstance(module, Packable):
            module.pack()
    return model


def unpack_model(model: ModuleT) -> ModuleT:
    """Undo :func:`pack_model`, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.unpack()
    return model
