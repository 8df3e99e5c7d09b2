"""TriXBlock and TriXStack: transformer blocks whose feed-forward layer is made of ternary tiles."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor, nn

from trix.nn.attention import KeyValueCache, RotaryAttention
from trix.nn.ffn import FFNConfig, TriXFFN
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import AuxLosses, RoutingInfo


class TriXBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), norm = RMSNorm; a sparse lookup has norm and residual of its own.

    Shape:
        x_BTD: float [B, T, D] -> [B, T, D]; with ``return_routing`` also the layer's RoutingInfo and AuxLosses, which are None
        where ``ffn.kind`` is a control without tiles. token_BT: int64, the ids of the tokens, for routing by ``hash``. mask_BT:
        bool, False for padding: no token looks at it, the tiles do not count it, nor, but in a sparse lookup, compute it.
        embedding_BTD: the embeddings of the tokens, for routing on them; by default x_BTD, as in the first block. cache: of the
        tokens before, as RotaryAttention.

    Raises:
        ValueError: as RotaryAttention and TriXFFN.
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        ffn: FFNConfig | None = None,
        context_length: int = 1024,
        ternary_attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = RotaryAttention(d_model, n_heads, context_length, ternary_attention, dropout)
        ffn = ffn or FFNConfig()
        self.ffn = ffn.build(d_model, dropout)
        reads_embedding = isinstance(self.ffn, TriXFFN | SparseLookupFFN) and ffn.route_on == "embedding"
        self.routing_norm = nn.RMSNorm(d_model, elementwise_affine=False) if reads_embedding else None
        has_own_norm = self.ffn is None or isinstance(self.ffn, SparseLookupFFN)
        self.ffn_norm = None if has_own_norm else nn.RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = ...,
        return_routing: Literal[False] = ...,
        token_BT: Tensor | None = ...,
        mask_BT: Tensor | None = ...,
        embedding_BTD: Tensor | None = ...,
        cache: KeyValueCache | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = ...,
        *,
        return_routing: Literal[True],
        token_BT: Tensor | None = ...,
        mask_BT: Tensor | None = ...,
        embedding_BTD: Tensor | None = ...,
        cache: KeyValueCache | None = ...,
    ) -> tuple[Tensor, RoutingInfo | None, AuxLosses | None]: ...
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = True,
        return_routing: bool = False,
        token_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        embedding_BTD: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor | tuple[Tensor, RoutingInfo | None, AuxLosses | None]:
        if embedding_BTD is None:
            embedding_BTD = x_BTD
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), is_causal, mask_BT, cache))
        info: RoutingInfo | None = None
        aux: AuxLosses | None = None
        routing_x = None if self.routing_norm is None else self.routing_norm(embedding_BTD)
        if isinstance(self.ffn, SparseLookupFFN):
            x_BTD, lookup, aux = self.ffn(x_BTD, mask=mask_BT, routing_x=routing_x)
            choice_shape = (*x_BTD.shape[:-1], self.ffn.router.top_k)
            info = {
                "tile_idx": lookup["tile_idx"].reshape(choice_shape),
                "weight": lookup["weight"].reshape(choice_shape),
                "scores": lookup["scores"],
            }
        elif self.ffn is not None and self.ffn_norm is not None:
            if isinstance(self.ffn, TriXFFN):
                y_BTD, info, aux = self.ffn(
                    self.ffn_norm(x_BTD),
                    return_routing=True,
                    token_idx=token_BT,
                    mask=mask_BT,
                    routing_x=routing_x,
                )
            else:
                y_BTD = self.ffn(self.ffn_norm(x_BTD))
            x_BTD = x_BTD + self.dropout(y_BTD)
        return (x_BTD, info, aux) if return_routing else x_BTD


class TriXStack(nn.Module):
    """num_layers TriXBlocks, one after the other.

    Shape:
        x_BTD: float -> [B, T, D]; with ``return_routing`` also the RoutingInfo of each routed layer, in order, and the summed
        AuxLosses (None without routed layers). token_BT, mask_BT: as TriXBlock. caches: one per block, of the tokens before.

    Raises:
        ValueError: num_layers < 1, another number of caches than of blocks, and as TriXBlock.
    """

    def __init__(
        self,
        num_layers: int = 4,
        d_model: int = 512,
        n_heads: int = 8,
        ffn: FFNConfig | None = None,
        context_length: int = 1024,
        ternary_attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers ({num_layers}) must be >= 1")
        self.blocks = nn.ModuleList(
            TriXBlock(d_model, n_heads, ffn, context_length, ternary_attention, dropout) for _ in range(num_layers)
        )

    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = ...,
        return_routing: Literal[False] = ...,
        token_BT: Tensor | None = ...,
        mask_BT: Tensor | None = ...,
        caches: Sequence[KeyValueCache] | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = ...,
        *,
        return_routing: Literal[True],
        token_BT: Tensor | None = ...,
        mask_BT: Tensor | None = ...,
        caches: Sequence[KeyValueCache] | None = ...,
    ) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool = True,
        return_routing: bool = False,
        token_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor | tuple[Tensor, list[RoutingInfo], AuxLosses | None]:
        infos: list[RoutingInfo] = []
        total: AuxLosses | None = None
        embedding_BTD = x_BTD
        cache_of = [None] * len(self.blocks) if caches is None else caches
        if len(cache_of) != len(self.blocks):
            raise ValueError(f"caches ({len(cache_of)}) must be as many as blocks ({len(self.blocks)})")
        for block, cache in zip(self.blocks, cache_of, strict=True):
            x_BTD, info, aux = block(x_BTD, is_causal, True, token_BT, mask_BT, embedding_BTD, cache)
            if info is not None:
                infos.append(info)
            if aux is not None:
                total = aux if total is None else _add(total, aux)
        return (x_BTD, infos, total) if return_routing else x_BTD


def _add(a: AuxLosses, b: AuxLosses) -> AuxLosses:
    return {
        "balance": a["balance"] + b["balance"],
        "ternary": a["ternary"] + b["ternary"],
        "sparsity": a["sparsity"] + b["sparsity"],
        "diversity": a["diversity"] + b["diversity"],
        "total_aux": a["total_aux"] + b["total_aux"],
    }
