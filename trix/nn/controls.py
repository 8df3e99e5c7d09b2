"""The controls: the same tiles, routed by something that is not a signature."""

from typing import Any

from trix.nn.ffn import TriXFFN


class GatedFFN(TriXFFN):
    """TriXFFN under a learned float gate, score = W x, which is trained through the weights it gives: what routing without a
    gate has to be measured against.

    Arguments, shapes and errors: see :class:`~trix.nn.ffn.TriXFFN`.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_tiles: int = 4,
        d_ff: int | None = None,
        top_k: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(d_model, num_tiles, d_ff, top_k, "learned", **settings)


class HashFFN(TriXFFN):
    """TriXFFN in which a fixed hash of the token's id names the tile: what routing that looks at the activation has to beat.

    Shape:
        x: float [B, D] or [B, T, D], token_idx: int64 [B] or [B, T] -> the shape of x. Called as ffn(x, token_idx=ids).

    Other arguments and errors: see :class:`~trix.nn.ffn.TriXFFN`; the hash: :class:`~trix.routing.hash_router.HashRouter`.
    """

    def __init__(self, d_model: int = 512, num_tiles: int = 4, d_ff: int | None = None) -> None:
        super().__init__(d_model, num_tiles, d_ff, routing="hash", balance_weight=0.0, balance_rate=0.0)
