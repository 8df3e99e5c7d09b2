"""A small sequence classifier of TriX blocks."""

from dataclasses import dataclass, field
from typing import Literal, overload

from torch import Tensor, nn

from trix.nn.block import TriXStack
from trix.nn.ffn import FFNConfig
from trix.outputs import AuxLosses, RoutingInfo


@dataclass(frozen=True)
class ClassifierConfig:
    """Size and kind of a :class:`Classifier`; fields as in LanguageModelConfig."""

    d_model: int = 64
    num_layers: int = 2
    n_heads: int = 4
    context_length: int = 64
    ternary_attention: bool = False
    dropout: float = 0.0
    ffn: FFNConfig = field(default_factory=FFNConfig)


class Classifier(nn.Module):
    """Linear input, TriXStack that looks both ways, mean over the sequence, RMSNorm, linear head.

    Shape:
        x_BTF: float [B, T, num_features], T <= context_length -> logits [B, num_classes]; with ``return_routing`` also the list
        of RoutingInfo and the summed AuxLosses (None without routed layers).

    Raises:
        ValueError: num_features or num_classes < 1, and as TriXStack.
    """

    def __init__(self, num_features: int, num_classes: int, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        if num_features < 1 or num_classes < 1:
            raise ValueError(f"num_features ({num_features}) and num_classes ({num_classes}) must be >= 1")
        self.config = config or ClassifierConfig()
        c = self.config
        self.embedding = nn.Linear(num_features, c.d_model)
        self.stack = TriXStack(c.num_layers, c.d_model, c.n_heads, c.ffn, c.context_length, c.ternary_attention, c.dropout)
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, num_classes)

    @overload
    def forward(self, x_BTF: Tensor, return_routing: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, x_BTF: Tensor, return_routing: Literal[True]) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    def forward(
        self, x_BTF: Tensor, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, list[RoutingInfo], AuxLosses | None]:
        x_BTD, infos, aux = self.stack(self.embedding(x_BTF), is_causal=False, return_routing=True)
        logits = self.head(self.norm(x_BTD.mean(dim=1)))
        return (logits, infos, aux) if return_routing else logits
