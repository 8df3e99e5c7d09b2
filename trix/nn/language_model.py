"""A small decoder-only language model of TriX blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from torch import Tensor, nn

from trix.nn.attention import KeyValueCache
from trix.nn.block import TriXBlock, TriXStack
from trix.nn.ffn import FFNConfig
from trix.outputs import AuxLosses, RoutingInfo


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size and kind of a :class:`LanguageModel`.

    Args:
        d_model: width. num_layers: blocks. n_heads: attention heads. context_length: the longest sequence, in tokens.
        ternary_attention: attention projections are ternary too. dropout: after attention and feed-forward layer.
        ffn: the feed-forward layers.
    """

    d_model: int = 128
    num_layers: int = 4
    n_heads: int = 4
    context_length: int = 128
    ternary_attention: bool = False
    dropout: float = 0.0
    ffn: FFNConfig = field(default_factory=FFNConfig)


class LanguageModel(nn.Module):
    """Embedding, TriXStack, RMSNorm, and a head that shares the embedding's matrix.

    Shape:
        token_BT: int64 in [0, vocab_size), T <= context_length -> logits [B, T, vocab_size]; with ``return_routing`` also the
        list of RoutingInfo (one per routed layer) and the summed AuxLosses (None without routed layers). caches: one per block,
        from :meth:`empty_caches`: the P tokens of the calls before come first, P + T <= context_length, and token_BT is added.

    Raises:
        ValueError: vocab_size < 1, and as TriXStack.
    """

    def __init__(self, vocab_size: int, config: LanguageModelConfig | None = None) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size ({vocab_size}) must be >= 1")
        self.vocab_size, self.config = vocab_size, config or LanguageModelConfig()
        c = self.config
        self.embedding = nn.Embedding(vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, std=c.d_model**-0.5)  # logits of unit scale: the head shares the matrix
        self.stack = TriXStack(c.num_layers, c.d_model, c.n_heads, c.ffn, c.context_length, c.ternary_attention, c.dropout)
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def empty_caches(self, batch_size: int) -> list[KeyValueCache]:
        """To be handed to each call that goes on with the same texts, which computes its new tokens alone."""
        return [block.attention.empty_cache(batch_size) for block in self.stack.blocks if isinstance(block, TriXBlock)]

    @overload
    def forward(
        self, token_BT: Tensor, return_routing: Literal[False] = ..., caches: Sequence[KeyValueCache] | None = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, token_BT: Tensor, return_routing: Literal[True], caches: Sequence[KeyValueCache] | None = ...
    ) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    def forward(
        self, token_BT: Tensor, return_routing: bool = False, caches: Sequence[KeyValueCache] | None = None
    ) -> Tensor | tuple[Tensor, list[RoutingInfo], AuxLosses | None]:
        x_BTD, infos, aux = self.stack(
            self.embedding(token_BT), is_causal=True, return_routing=True, token_BT=token_BT, caches=caches
        )
        logits = self.head(self.norm(x_BTD))
        return (logits, infos, aux) if return_routing else logits
