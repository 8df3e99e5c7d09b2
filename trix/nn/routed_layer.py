"""What counts as a routed layer."""

from torch import nn

from trix.nn.ffn import TriXFFN
from trix.nn.sparse_lookup import SparseLookupFFN

RoutedLayer = TriXFFN | SparseLookupFFN


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The layers that send tokens to tiles, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]
