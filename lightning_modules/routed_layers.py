"""The routed layers of a network, by the names under which callbacks log them."""

from torch import nn

from lightning_modules.errors import UserError
from trix.nn import RoutedLayer
from trix.nn import routed_layers as in_order


def routed_layers(network: nn.Module) -> dict[str, RoutedLayer]:
    """In the order of computation: {"layer_0": ..., "layer_1": ...}, the keys of a step's ``routing``."""
    return {layer_name(index): layer for index, layer in enumerate(in_order(network))}


def layer_name(index: int) -> str:
    return f"layer_{index}"


def check_reports_routing(task: nn.Module, callback: str) -> None:
    """Raise UserError unless the task's steps return their routing, which the callback reads."""
    if not getattr(task, "reports_routing", False):
        rule = "needs a task whose steps return their routing (reports_routing), as those of a RoutedTask"
        raise UserError(f"{callback} {rule}; {type(task).__name__} is none")
