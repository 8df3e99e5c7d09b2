"""The routing of the first tokens of an evaluation, kept one by one.

Shape suffixes: N tokens of the sample, T tokens of the first sequence, K chosen tiles, E tiles.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.tasks import RoutedTask
from trix.outputs import RoutingInfo
from trix.routing.confidence import routing_confidence

MAX_TOKENS = 2048  # they stand in every checkpoint
MAX_TOKENS_OF_SEQUENCE = 48


class TokenSample:
    """What the routers decided for the first tokens of an evaluation, by layer, on the CPU.

    Attributes:
        label_N: the labels of the first batches, int32 (float32 where they are no classes); with them two samples are known to
            be of the same tokens.
        tile_N: {layer: the best tile of each token, int16}. confidence_N: {layer: the gap of its best two scores, float32}.
        first: {layer: the routing of the first sequence, [T, ...], of which up to 48 tokens}. tokens: how those are written;
            None where tokens are no characters.
    """

    def __init__(self) -> None:
        self.label_N = torch.zeros(0, dtype=torch.int32)
        self.tile_N: dict[str, Tensor] = {}
        self.confidence_N: dict[str, Tensor] = {}
        self.first: dict[str, RoutingInfo] = {}
        self.tokens: list[str] | None = None
        self._is_full = False

    def update(self, outputs: Any, batch: Any, pl_module: L.LightningModule) -> None:
        """Take a step's outputs into account, until there are enough tokens."""
        if self._is_full or not outputs["routing"]:
            return
        if not self.first:
            self._take_first_sequence(outputs["routing"], batch[0], pl_module)
        label = outputs["label"].flatten()
        self.label_N = _extended(self.label_N, label.to(torch.float32 if label.is_floating_point() else torch.int32))
        for name, info in outputs["routing"].items():
            tile_N = info["tile_idx"][..., 0].flatten()[:MAX_TOKENS].to(torch.int16)
            score_NE = info["scores"].flatten(end_dim=-2)[:MAX_TOKENS].float()
            self.tile_N[name] = _extended(self.tile_N.get(name), tile_N)
            self.confidence_N[name] = _extended(self.confidence_N.get(name), routing_confidence(score_NE))
            self._is_full = len(self.tile_N[name]) == MAX_TOKENS

    def _take_first_sequence(self, routing: dict[str, RoutingInfo], x: Tensor, pl_module: L.LightningModule) -> None:
        mask_BT = pl_module.padding_mask(x) if isinstance(pl_module, RoutedTask) else None
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

    def num_changed(self, earlier: dict[str, Any], name: str) -> tuple[int, int] | None:
        """How many tokens have another best tile than in the :meth:`state` of an earlier sample, of how many.

        None where the tokens are not the same.
        """
        tile_N = earlier.get("tile", {}).get(name)
        if tile_N is None or tile_N.shape != self.tile_N[name].shape or not torch.equal(earlier["label"], self.label_N):
            return None
        return int((tile_N != self.tile_N[name]).sum()), len(tile_N)

    def state(self) -> dict[str, Any]:
        """What a later sample is compared with, as tensors."""
        return {"label": self.label_N, "tile": dict(self.tile_N)}


def _extended(values: Tensor | None, more: Tensor) -> Tensor:
    more = more[:MAX_TOKENS].cpu()
    return more if values is None else torch.cat([values, more])[:MAX_TOKENS]
