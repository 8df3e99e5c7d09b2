"""A small sequence classifier of TriX blocks."""

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn

from trix.nn.block import StackConfig
from trix.nn.context_code import ContextCode
from trix.nn.feature_code import FeatureCode
from trix.nn.fixed_code import FixedCode
from trix.nn.routed_layer import routed_layers
from trix.outputs import AuxLosses, RoutingInfo, TokenContext

PADDING_TOKEN = 0


@dataclass(frozen=True)
class ClassifierConfig(StackConfig):
    """Size and kind of a :class:`Classifier`; fields as in StackConfig, and

    Args:
        window: odd; where tokens are ids, a token's vector is the sum of its own embedding and of a convolution over the
            embeddings of that many tokens around it. 1 does without: the embedding alone.
    """

    d_model: int = 64
    num_layers: int = 2
    context_length: int = 64
    window: int = 1


class WindowEmbedding(nn.Embedding):
    """y[t] = e[t] + sum_i W_i e[t + i - window // 2] with e the embeddings, 0 for padding and beyond the ends.

    Shape:
        token_BT: int64 [B, T] -> [B, T, d_model].

    Raises:
        ValueError: window is even or < 1.
    """

    def __init__(self, vocab_size: int, d_model: int, window: int) -> None:
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window ({window}) must be odd and >= 1")
        super().__init__(vocab_size, d_model, padding_idx=PADDING_TOKEN)
        self.mix = nn.Conv1d(d_model, d_model, window, padding=window // 2, bias=False) if window > 1 else None

    def forward(self, token_BT: Tensor) -> Tensor:
        x_BTD = super().forward(token_BT)
        return x_BTD if self.mix is None else x_BTD + self.mix(x_BTD.mT).mT


class Classifier(nn.Module):
    """Linear input or embedding, TriXStack that looks both ways, mean over the sequence, RMSNorm, linear head.

    Args:
        num_features: width of a token that is a vector, or None with ``vocab_size``, the number of ids of tokens that are
            characters or the like; id 0 is padding: no token looks at it, no tile counts it, the mean leaves it out.

    Shape:
        x: float [B, T, num_features] or int64 [B, T] in [0, vocab_size), T <= context_length -> logits [B, num_classes]; with
        ``return_routing`` also the list of RoutingInfo and the summed AuxLosses (None without routed layers).

    Raises:
        ValueError: both or neither of num_features and vocab_size, a size < 1, routing by token ids without any, and as
            WindowEmbedding and TriXStack.
    """

    def __init__(
        self,
        num_features: int | None,
        num_classes: int,
        config: ClassifierConfig | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        if (num_features is None) == (vocab_size is None):
            raise ValueError(f"exactly one of num_features ({num_features}) and vocab_size ({vocab_size}) must be given")
        for name, size in (("num_features", num_features), ("vocab_size", vocab_size), ("num_classes", num_classes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} ({size}) must be >= 1")
        self.vocab_size, self.config = vocab_size, config or ClassifierConfig()
        c = self.config
        self.embedding: nn.Module
        code: type[FixedCode]
        if num_features is not None:
            self.embedding, code, num_rows = nn.Linear(num_features, c.d_model), FeatureCode, num_features
        else:
            assert vocab_size is not None
            self.embedding, code, num_rows = WindowEmbedding(vocab_size, c.d_model, c.window), ContextCode, vocab_size
        self.stack = c.make_stack()
        self.context_code = c.ffn.make_code(code, num_rows, c.d_model) if self.stack.reads_code else None
        if vocab_size is None and any("token" in layer.router.reads for layer in routed_layers(self.stack)):
            raise ValueError(f"routing ({c.ffn.routing!r}) needs the id of each token, and tokens are vectors here")
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, num_classes)

    def padding_mask(self, x: Tensor) -> Tensor | None:
        """bool [B, T], False for padding; None where there is none, as tokens are vectors."""
        return None if self.vocab_size is None else x != PADDING_TOKEN

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True]) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, list[RoutingInfo], AuxLosses | None]:
        mask_BT = self.padding_mask(x)
        token_BT = None if self.vocab_size is None else x
        context = TokenContext(token_BT, mask_BT)
        if self.context_code is not None:
            context = context._replace(code_BTD=self.context_code(x, mask_BT)[0])
        x_BTD, infos, aux = self.stack(self.embedding(x), is_causal=False, return_routing=True, context=context)
        logits = self.head(self.norm(_mean(x_BTD, mask_BT)))
        return (logits, infos, aux) if return_routing else logits


def _mean(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Over the tokens of each row, padding left out: [B, D]; 0 for a row of padding alone."""
    if mask_BT is None:
        return x_BTD.mean(dim=1)
    weight_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
    return (x_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)
