"""TriXFFN: a feed-forward layer of ternary tiles, routed by signatures. And its dense control."""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.signatures import signature_diversity
from trix.nn.tiles import TernaryTiles
from trix.outputs import AuxLosses, RoutingDecision, RoutingInfo
from trix.routing.balance import balance_loss, tile_load
from trix.routing.router import LearnedRouter, SignatureRouter

Routing = Literal["explicit", "emergent", "learned"]


class TriXFFN(nn.Module):
    """Each token is computed by the top_k tiles whose signatures agree with it most.

    y[t] = sum_k weight[t, k] * tile_{tile_idx[t, k]}(x[t]); the tiles are :class:`~trix.nn.tiles.TernaryTiles`, the routing
    is :class:`~trix.routing.router.SignatureRouter`, or the learned gate as a control.

    Args:
        d_model: width of input and output.
        num_tiles: number of tiles E.
        d_ff: hidden width of all tiles together; each gets d_ff / num_tiles. Default: d_model for each tile.
        top_k: tiles per token.
        routing: ``emergent`` reads signatures from the up weights, ``explicit`` learns them, ``learned`` is a float gate.
        balance_weight: weight of the balance loss. balance_rate: step of the balance bias, per training batch.

    Shape:
        x: float [B, D] or [B, T, D] (any leading dimensions) -> the same shape and dtype.

    Raises:
        ValueError: d_ff not divisible by num_tiles, top_k > num_tiles, or a wrong last dimension of x.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_tiles: int = 4,
        d_ff: int | None = None,
        top_k: int = 1,
        routing: Routing = "emergent",
        balance_weight: float = 0.01,
        balance_rate: float = 0.01,
    ) -> None:
        super().__init__()
        d_ff = d_model * num_tiles if d_ff is None else d_ff
        if num_tiles < 1 or d_ff < 1 or d_ff % num_tiles:
            raise ValueError(f"d_ff ({d_ff}) must be divisible by num_tiles ({num_tiles}), both >= 1")
        if routing not in ("explicit", "emergent", "learned"):
            raise ValueError(f"routing ({routing!r}) must be 'explicit', 'emergent' or 'learned'")
        self.d_model, self.num_tiles, self.balance_weight = d_model, num_tiles, balance_weight
        self.router: SignatureRouter | LearnedRouter
        if routing == "learned":
            self.router = LearnedRouter(d_model, num_tiles, top_k, balance_rate)
        else:
            self.router = SignatureRouter(d_model, num_tiles, top_k, balance_rate, source=routing)
        self.tiles = TernaryTiles(d_model, num_tiles, d_ff // num_tiles)

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True]) -> tuple[Tensor, RoutingInfo, AuxLosses]: ...
    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, RoutingInfo, AuxLosses]:
        x_TD = x.reshape(-1, x.shape[-1])
        decision = self._route(x_TD)
        if self.training:
            self.router.update_balance(decision.tile_idx)
        y = self.tiles(x_TD, decision.tile_idx, decision.weight).to(x.dtype).reshape(x.shape)
        if not return_routing:
            return y
        info: RoutingInfo = {
            "tile_idx": _like(x, decision.tile_idx),
            "weight": _like(x, decision.weight),
            "scores": _like(x, decision.score),
        }
        return y, info, self._aux_losses(decision)

    def _route(self, x_TD: Tensor) -> RoutingDecision:
        if isinstance(self.router, LearnedRouter):
            return self.router(x_TD)
        return self.router(x_TD, self._emergent_signatures())

    def _emergent_signatures(self) -> Tensor | None:
        router = self.router
        if isinstance(router, LearnedRouter) or router.source == "explicit" or router.packed_signatures is not None:
            return None
        return self.tiles.signatures()

    def _aux_losses(self, decision: RoutingDecision) -> AuxLosses:
        zero = decision.score.new_zeros(())
        is_on = self.training and self.balance_weight > 0
        balance = self.balance_weight * balance_loss(decision.score, decision.tile_idx) if is_on else zero
        return {"balance": balance, "total_aux": balance}

    def get_tile_signatures(self) -> Tensor:
        """Signatures in force: [E, D] in {-1, 0, +1}. Under the learned gate, those that the tiles' weights would give."""
        if isinstance(self.router, LearnedRouter):
            return self.tiles.signatures()
        return self.router.signatures(self._emergent_signatures()).detach()

    def get_signature_diversity(self) -> float:
        """Mean over pairs of tiles of the fraction of positions at which their signatures differ, in [0, 1]."""
        return float(signature_diversity(self.get_tile_signatures()))

    @torch.no_grad()
    def get_routing_stats(self, x: Tensor) -> dict[str, float | int | list[float]]:
        """Where the tokens of x go.

        Returns:
            usage: share of assignments per tile; balance: min / max of usage; entropy: of usage, in nats; dominant_tile;
            confidence: mean gap between the best two scores (0 with a single tile).
        """
        decision = self._route(x.reshape(-1, x.shape[-1]))
        usage = tile_load(decision.tile_idx, self.num_tiles)
        best = decision.score.float().topk(min(2, self.num_tiles), dim=-1).values
        gap = best[:, 0] - best[:, -1]
        return {
            "usage": usage.tolist(),
            "balance": float(usage.min() / usage.max().clamp_min(torch.finfo(usage.dtype).tiny)),
            "entropy": float(torch.special.entr(usage).sum()),
            "dominant_tile": int(usage.argmax()),
            "confidence": float(gap.mean()) if len(gap) else 0.0,
        }

    def freeze_signature(self, tile_idx: int) -> None:
        """Hold one tile's signature at its present value: no optimizer can move it."""
        self._signature_router().freeze(tile_idx, self._emergent_signatures())

    def unfreeze_signature(self, tile_idx: int) -> None:
        """Let one tile's signature learn (explicit) or follow its weights (emergent) again."""
        self._signature_router().unfreeze(tile_idx)

    def is_frozen(self, tile_idx: int) -> bool:
        return self._signature_router().is_frozen(tile_idx)

    def _signature_router(self) -> SignatureRouter:
        if isinstance(self.router, LearnedRouter):
            raise ValueError("routing ('learned') has no signatures to freeze; use 'explicit' or 'emergent'")
        return self.router

    def pack(self) -> None:
        """Replace float weights and signatures by their 2-bit form; inference only afterwards. Idempotent."""
        if isinstance(self.router, SignatureRouter):
            self.router.pack_signatures(self._emergent_signatures())
        self.tiles.up.pack()
        self.tiles.down.pack()

    def unpack(self) -> None:
        """Undo :meth:`pack`: float weights with the same ternary form."""
        if isinstance(self.router, SignatureRouter):
            self.router.unpack_signatures()
        self.tiles.up.unpack()
        self.tiles.down.unpack()


def _like(x: Tensor, value_TK: Tensor) -> Tensor:
    """[T, K] in the leading dimensions of x."""
    return value_TK.reshape(*x.shape[:-1], value_TK.shape[-1])


class DenseFFN(nn.Module):
    """The dense control: y = W_down relu(W_up x)^2 with float weights. x: float [..., D] -> [..., D]."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


@dataclass(frozen=True)
class FFNConfig:
    """Which feed-forward layer a block holds.

    Args:
        kind: ``trix`` (tiles), or a control: ``dense`` (float, width d_ff) or ``none`` (no feed-forward layer at all).
        num_tiles, d_ff, top_k, routing, balance_weight, balance_rate: see :class:`TriXFFN`; a dense layer reads only d_ff
            (default 4 * d_model).
    """

    kind: Literal["trix", "dense", "none"] = "trix"
    num_tiles: int = 16
    d_ff: int | None = None
    top_k: int = 1
    routing: Routing = "explicit"
    balance_weight: float = 0.01
    balance_rate: float = 0.01

    def build(self, d_model: int) -> nn.Module | None:
        if self.kind == "none":
            return None
        if self.kind == "dense":
            return DenseFFN(d_model, 4 * d_model if self.d_ff is None else self.d_ff)
        if self.kind != "trix":
            raise ValueError(f"kind ({self.kind!r}) must be 'trix', 'dense' or 'none'")
        return TriXFFN(
            d_model,
            self.num_tiles,
            self.d_ff,
            self.top_k,
            self.routing,
            self.balance_weight,
            self.balance_rate,
        )
