"""The routing of the first tokens of an evaluation, kept one by one.

Shape suffixes: N tokens of the sample, T tokens of the first sequence, K chosen tiles, E tiles, D width of what routers read.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.callbacks.routing_factors import RoutingFactors, directions_of, num_moved
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import RoutedTask
from trix.outputs import Directions, RoutingInfo
from trix.routing.confidence import routing_confidence

MAX_TOKENS = 2048  # they stand in every checkpoint
MAX_TOKENS_OF_SEQUENCE = 48


class TokenSample:
    """What the routers decided for the first tokens of an evaluation, by layer, on the CPU.

    Attributes:
        label_N: the labels of the first batches, int32 (float32 where they are no classes); with them two samples are known to
            be of the same tokens.
        tile_N: {layer: the best tile of each token, int16}. confidence_N: {layer: the gap of its best two scores, float32}.
        read_ND: {layer: what its router read of each token, float32}. directions: {layer: what it compared that with}. Both
            are there only where the choice is a matter of directions.
        first: {layer: the routing of the first sequence, [T, ...], of which up to 48 tokens}. tokens: how those are written;
            None where tokens are no characters.
    """

    def __init__(self) -> None:
        self.label_N = torch.zeros(0, dtype=torch.int32)
        self.tile_N: dict[str, Tensor] = {}
        self.confidence_N: dict[str, Tensor] = {}
        self.read_ND: dict[str, Tensor] = {}
        self.directions: dict[str, Directions] = {}
        self.first: dict[str, RoutingInfo] = {}
        self.tokens: list[str] | None = None
        self.is_full = False

    def update(
        self, outputs: Any, batch: Any, pl_module: L.LightningModule, read_TD: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take a step's outputs into account, until there are enough tokens.

        Args:
            read_TD: what the routers read of all tokens of the batch, by layer, padding among them: [T, D].
        """
        if self.is_full or not outputs["routing"]:
            return
        if not self.first:
            self._take_first_sequence(outputs["routing"], batch[0], pl_module)
            found = {name: directions_of(layer) for name, layer in routed_layers(pl_module).items() if name in (read_TD or {})}
            self.directions = {name: directions for name, directions in found.items() if directions is not None}
        self._take_what_was_read(outputs["routing"], _padding_mask(batch[0], pl_module), read_TD or {})
        label = outputs["label"].flatten()
        self.label_N = _extended(self.label_N, label.to(torch.float32 if label.is_floating_point() else torch.int32))
        for name, info in outputs["routing"].items():
            tile_N = info["tile_idx"][..., 0].flatten()[:MAX_TOKENS].to(torch.int16)
            score_NE = info["scores"].flatten(end_dim=-2)[:MAX_TOKENS].float()
            self.tile_N[name] = _extended(self.tile_N.get(name), tile_N)
            self.confidence_N[name] = _extended(self.confidence_N.get(name), routing_confidence(score_NE))
            self.is_full = len(self.tile_N[name]) == MAX_TOKENS

    def _take_first_sequence(self, routing: dict[str, RoutingInfo], x: Tensor, pl_module: L.LightningModule) -> None:
        mask_BT = _padding_mask(x, pl_module)
        if mask_BT is not None:
            token_T = x[0][mask_BT[0]]
        else:  # where an example is one token, the batch is the sequence
            token_T = x if all(info["tile_idx"].dim() == 2 for info in routing.values()) else x[0]
        token_T = token_T[:MAX_TOKENS_OF_SEQUENCE]
        vocabulary = getattr(pl_module, "vocabulary", None)
        if isinstance(vocabulary, str) and not token_T.is_floating_point():
            self.tokens = [vocabulary[index] for index in token_T.tolist()]
        for name, info in routing.items():
            self.first[name] = {
                "tile_idx": info["tile_idx"].flatten(end_dim=-2)[: len(token_T)].cpu(),
                "weight": info["weight"].flatten(end_dim=-2)[: len(token_T)].cpu(),
                "scores": info["scores"].flatten(end_dim=-2)[: len(token_T)].cpu(),
            }

    def _take_what_was_read(
        self, routing: dict[str, RoutingInfo], mask_BT: Tensor | None, read_TD: Mapping[str, Tensor]
    ) -> None:
        for name, info in routing.items():
            if name not in self.directions:
                continue
            num_tokens, read = info["tile_idx"].flatten(end_dim=-2).shape[0], read_TD.get(name)
            if read is not None and mask_BT is not None and len(read) == mask_BT.numel():
                read = read[mask_BT.flatten()]
            width = self.directions[name].direction_ED.shape[-1]
            if read is None or read.shape != (num_tokens, width):  # a layer of another kind; nothing can be said of it
                del self.directions[name]
                self.read_ND.pop(name, None)
                continue
            self.read_ND[name] = _extended(self.read_ND.get(name), read.detach()[:MAX_TOKENS].float())

    def num_changed(self, earlier: dict[str, Any], name: str) -> tuple[int, int] | None:
        """How many tokens have another best tile than in the :meth:`state` of an earlier sample, of how many.

        None where the tokens are not the same.
        """
        tile_N = earlier.get("tile", {}).get(name)
        if tile_N is None or tile_N.shape != self.tile_N[name].shape or not torch.equal(earlier["label"], self.label_N):
            return None
        return int((tile_N != self.tile_N[name]).sum()), len(tile_N)

    def num_moved(self, earlier: dict[str, Any], name: str) -> dict[str, int] | None:
        """How many tokens each factor of the choice alone would move since an earlier sample: see :func:`num_moved`.

        None where the tokens are not the same, or the choice is not decided by directions.
        """
        before, now = earlier.get("factors", {}).get(name), self._factors().get(name)
        if before is None or now is None or self.num_changed(earlier, name) is None:
            return None
        return num_moved(RoutingFactors(**before), now)

    def _factors(self) -> dict[str, RoutingFactors]:
        return {name: RoutingFactors(read, *self.directions[name]) for name, read in self.read_ND.items()}

    def state(self) -> dict[str, Any]:
        """What a later sample is compared with, as tensors; where all layers read the same, that is one tensor in a file."""
        read: list[Tensor] = []
        factors: dict[str, dict[str, Tensor]] = {}
        for name, of_layer in self._factors().items():
            features = next((other for other in read if torch.equal(other, of_layer.features)), of_layer.features)
            read.append(features)
            factors[name] = {"features": features, "signatures": of_layer.signatures, "bias": of_layer.bias}
        return {"label": self.label_N, "tile": dict(self.tile_N), "factors": factors}


def _padding_mask(x: Tensor, pl_module: L.LightningModule) -> Tensor | None:
    return pl_module.padding_mask(x) if isinstance(pl_module, RoutedTask) else None


def _extended(values: Tensor | None, more: Tensor) -> Tensor:
    """The values and as many more as there is room for, in memory of their own size: a file holds the whole of it."""
    more = more[: MAX_TOKENS - (0 if values is None else len(values))].cpu()
    return more.clone() if values is None else torch.cat([values, more])
