"""The routed layers of a network, by the names under which callbacks log them."""

from torch import nn

from trix.nn import TriXFFN


def routed_layers(network: nn.Module) -> dict[str, TriXFFN]:
    """The TriXFFN layers in the order of computation: {"layer_0": ..., "layer_1": ...}, the keys of a step's ``routing``."""
    layers = [module for _, module in network.named_modules() if isinstance(module, TriXFFN)]
    return {layer_name(index): layer for index, layer in enumerate(layers)}


def layer_name(index: int) -> str:
    return f"layer_{index}"
