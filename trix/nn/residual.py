"""The frame of a sublayer: norm before, dropout after, and the sum with the residual stream."""

from typing import Protocol, cast

from torch import Tensor, nn

from trix.nn.mixer import Mixer
from trix.outputs import LayerOutput, State, TokenContext


class FeedForward(Protocol):
    """A feed-forward layer that reports how it routed. It is called as ``layer_output``, which calls its ``forward``."""

    def layer_output(self, x_BTD: Tensor, context: TokenContext) -> LayerOutput:
        """Its answer for the tokens; ``context.embedding_BTD``: what its router reads instead of x_BTD."""
        ...


def make_dropout(dropout: float) -> nn.Dropout:
    """Raises ValueError unless dropout is within [0, 1], with the name that configurations know it by."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout ({dropout}) must be >= 0 and <= 1")
    return nn.Dropout(dropout)


class Residual(nn.Module):
    """x + dropout(inner(norm(x))).

    Args:
        norm_last: the norm's parameters come after those of the inner module, for optimizers, which know parameters by their
            place.

    Raises:
        ValueError: dropout is not within [0, 1].
    """

    norm: nn.Module
    inner: nn.Module

    def __init__(self, norm: nn.Module, inner: nn.Module, dropout: float, norm_last: bool = False) -> None:
        super().__init__()
        for name, module in [("inner", inner), ("norm", norm)] if norm_last else [("norm", norm), ("inner", inner)]:
            self.add_module(name, module)
        self.dropout = make_dropout(dropout)


class MixerResidual(Residual):
    """The frame of a :class:`~trix.nn.mixer.Mixer`: the stream with its update, the new state, and the phase."""

    inner: Mixer

    def forward(self, x_BTD: Tensor, context: TokenContext, state: State | None = None) -> tuple[Tensor, State, Tensor | None]:
        update_BTD, state, phase_BT = self.inner(self.norm(x_BTD), context, state)
        return x_BTD + self.dropout(update_BTD), state, phase_BT


class FeedForwardResidual(Residual):
    """The frame of a feed-forward layer: one with ``layer_output``, or any module that maps [B, T, D] to [B, T, D]."""

    def forward(self, x_BTD: Tensor, context: TokenContext) -> LayerOutput:
        h_BTD, inner = self.norm(x_BTD), cast(FeedForward, self.inner)
        y = inner.layer_output(h_BTD, context) if hasattr(inner, "layer_output") else LayerOutput(self.inner(h_BTD))
        return y._replace(x_BTD=x_BTD + self.dropout(y.x_BTD))

    def layer_output(self, x_BTD: Tensor, context: TokenContext) -> LayerOutput:
        return self(x_BTD, context)
