"""What a router's choice is made of, kept from one validation to the next, and which part of it moved the tokens.

Shape suffixes: N tokens, D width of what the router reads, E tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trix.functional.tile_matmul import select_top_k
from trix.nn import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import Directions

FACTORS = ("features", "signatures", "bias")


@dataclass(frozen=True)
class RoutingFactors:
    """The best tile is that of the highest <features, signature> + bias, all float32 on the CPU.

    features: [N, D], what the router reads of each token. signatures: [E, D], its directions. bias: [E], -inf for a tile that
    cannot be chosen.
    """

    features: Tensor
    signatures: Tensor
    bias: Tensor

    def best_tile(self) -> Tensor:
        """int64 [N]."""
        return select_top_k(self.features @ self.signatures.T + self.bias, 1).squeeze(-1)


def num_moved(before: RoutingFactors, now: RoutingFactors) -> dict[str, int]:
    """By factor, how many tokens get another best tile where this one alone is replaced by its present value."""
    tile_N = before.best_tile()
    changed = {name: replace(before, **{name: getattr(now, name)}) for name in FACTORS}
    return {name: int((factors.best_tile() != tile_N).sum()) for name, factors in changed.items()}


def directions_of(layer: RoutedLayer) -> Directions | None:
    """What the layer's router compares tokens with, float32 on the CPU; None where it chooses by no directions."""
    with torch.no_grad():
        directions = layer.router.explain(layer.emergent_signatures())
    # Copies: on the CPU a buffer would go on moving.
    return None if directions is None else Directions(*(value.detach().float().cpu().clone() for value in directions))


class FeatureNotes:
    """What the routers read in one run of a network, by layer: [T, D], the first time that a layer runs."""

    def __init__(self) -> None:
        self.read_TD: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def begin(self, layers: dict[str, RoutedLayer]) -> None:
        """Note what is read from now on."""
        self.end()
        self._handles = [self._listen(name, layer) for name, layer in layers.items()]

    def end(self) -> None:
        """Note nothing more, and forget what was noted."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.read_TD = [], {}

    def _listen(self, name: str, layer: RoutedLayer) -> RemovableHandle:
        if isinstance(layer, SparseLookupFFN):  # it asks its router for the choice alone, without a forward to hook

            def note_layer(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                x = inputs[0] if inputs else named["x"]
                read = named.get("routing_x", inputs[3] if len(inputs) > 3 else None)
                self._note(name, lambda: layer.norm(x) if read is None else read)

            return layer.register_forward_pre_hook(note_layer, with_kwargs=True)

        def note_router(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._note(name, lambda: inputs[0])

        return layer.router.register_forward_pre_hook(note_router)

    def _note(self, name: str, read: Callable[[], Tensor]) -> None:
        if torch.compiler.is_compiling() or name in self.read_TD:  # a compiled graph would note for ever
            return
        with torch.no_grad():
            value = read()
        self.read_TD[name] = value.detach().reshape(-1, value.shape[-1])
