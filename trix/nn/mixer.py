"""What every mixer of a block is: the part through which tokens learn of each other."""

from abc import ABC, abstractmethod
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from trix.outputs import State, StateSpec, TokenContext


class Mixer(nn.Module, ABC):
    """update, state, phase = mixer(norm(x), context, state); the block adds the update to the stream.

    A mixer is made as ``Mixer(d_model, n_heads=..., context_length=..., ternary=..., dropout=..., **mixer_args)``; it ignores
    those that it has no use for.

    Class attributes:
        is_causal_only: it cannot look at later tokens, so a model that looks both ways refuses it.
        gives: what it says of each token besides the update: {"phase"}, or nothing.

    Shape:
        x_BTD: float. context: see TokenContext. state: what :meth:`state_specs` names, of the tokens before; None where there
        are none and nothing is to be kept. Returns the update [B, T, D]; the state with the new tokens, () for None; and
        phase_BT float, or None.
    """

    is_causal_only: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps of the tokens that it has read."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, context: TokenContext, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]: ...

    def empty_state(self, batch_size: int) -> State:
        """The state before the first token, zeros in the dtype and on the device of the weights."""
        floats = (value for value in chain(self.parameters(), self.buffers()) if value.is_floating_point())
        like = next(floats, torch.empty(0))
        size_of = {"batch": batch_size, "past": 0}
        shapes = [[size_of[size] if isinstance(size, str) else size for size in spec.shape] for spec in self.state_specs()]
        return tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes)
