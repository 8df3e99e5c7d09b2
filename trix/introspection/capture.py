"""One run of a model, with what every routed layer's router got and decided."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trix.nn.routed_layer import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import LookupInfo, RoutingDecision


@dataclass(frozen=True)
class Capture:
    """One run, layer by layer: x_TD, the tokens as the router saw them, flattened; decision, what the layer made of them.

    Padding, which the mask of a layer names, has weight 0.
    """

    x_TD: tuple[Tensor, ...]
    decision: tuple[RoutingDecision, ...]


Note = tuple[Tensor, RoutingDecision]


@torch.no_grad()
def capture_routing(model: nn.Module, layers: Sequence[RoutedLayer], batches: Iterable[Any]) -> Capture:
    """Run the model once on each batch, in evaluation mode, and note every layer; the model is left as it was.

    A layer that runs several times on a batch is noted the first time.

    Raises:
        ValueError: no batches, or a layer that the model does not run.
    """
    noted: list[list[Note]] = [[] for _ in layers]
    for batch in batches:
        of_batch: list[list[Note]] = [[] for _ in layers]
        handles = [handle for layer, notes in zip(layers, of_batch, strict=True) for handle in _note(layer, notes)]
        try:
            with _evaluating(model):
                model(batch)
        finally:
            for handle in handles:
                handle.remove()
        for index, notes in enumerate(of_batch):
            if not notes:
                raise ValueError(f"routed layer ({index}) of the model must take part in computing its output")
            noted[index].append(notes[0])
    if not all(noted):
        raise ValueError("number of batches (0) must be >= 1")
    x_TD = tuple(torch.cat([x for x, _ in notes]) for notes in noted)
    decision = tuple(RoutingDecision(*map(torch.cat, zip(*(d for _, d in notes), strict=True))) for notes in noted)
    return Capture(x_TD, decision)


def _note(layer: RoutedLayer, notes: list[Note]) -> tuple[RemovableHandle, RemovableHandle]:
    """Note each run of the layer; the second hook comes after the first."""

    def leave_out_padding(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
        mask = _argument(layer, "mask", inputs, named)
        if mask is not None:
            x_TD, decision = notes[-1]
            notes[-1] = (x_TD, decision._replace(weight=decision.weight * mask.reshape(-1, 1)))

    return note_decision(layer, notes), layer.register_forward_hook(leave_out_padding, with_kwargs=True)


def note_decision(layer: RoutedLayer, notes: list[Note]) -> RemovableHandle:
    """Note what the layer's router gets and decides at each run, until the handle is removed: x_TD in the dtype of the scores,
    and the decision. In a :class:`~trix.nn.TriXFFN` the hook comes before the tiles are computed.
    """
    if isinstance(layer, SparseLookupFFN):  # it asks its router for the choice alone, without a forward to hook

        def note_lookup(
            _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: tuple[Tensor, LookupInfo, Any]
        ) -> None:
            info, routing_x = output[1], _argument(layer, "routing_x", inputs, named)
            score_TE = info["scores"].reshape(-1, layer.num_tiles)
            x = layer.norm(_argument(layer, "x", inputs, named)) if routing_x is None else routing_x
            x_TD, choice_shape = x.reshape(-1, layer.d_model).to(score_TE.dtype), (len(score_TE), layer.router.top_k)
            tile_idx_TK, weight_TK = info["tile_idx"].reshape(choice_shape), info["weight"].reshape(choice_shape)
            notes.append((x_TD, RoutingDecision(tile_idx_TK, weight_TK, score_TE)))

        return layer.register_forward_hook(note_lookup, with_kwargs=True)

    def note_router(_: nn.Module, inputs: tuple[Tensor, ...], decision: RoutingDecision) -> None:
        notes.append((inputs[0].to(decision.score.dtype), decision))

    return layer.router.register_forward_hook(note_router)


def _argument(layer: RoutedLayer, name: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a call of the layer's forward got under this name, or None."""
    return inspect.signature(layer.forward).bind(*inputs, **named).arguments.get(name)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
