"""Codes of the last few tokens, which no gradient moves: what signatures read with ``route_on: context``."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.outputs import State, StateSpec
from trix.routing.facts import moved

SHIFT = 7  # places; tells the tokens of a code apart
# Unlikely as the seed of a model, whose first weights would otherwise equal the codes.
SEED = 20_261_129


class ContextCode(nn.Module):
    """c[t] = RMSnorm(sum_{j < J} decay^j roll(R[id_{t-j}], 7 j)), R a table of random rows of root mean square 1.

    R is drawn with a seed of its own: models of the same vocabulary and width have the same codes. Nothing trains it, so
    signatures that stay where they are send the same J tokens to the same tile for ever. Ids before the first token and ids
    of padding contribute 0. R stays in at least float32 under casts, so that rounding changes no tile.

    Args:
        vocab_size: V. d_model: D. num_tokens: J, the token itself among them. decay: factor on the weight from a token to the
            one before it.

    Attributes:
        table_VD: float [V, D], R; in the state_dict.

    Shape:
        token_BT: int64 in [0, V). mask_BT: bool, False for padding; None: there is none. state: as :meth:`state_specs`; None
        at the beginning of the texts. Returns (float [B, T, D], the new state).

    Raises:
        ValueError: vocab_size, d_model or num_tokens < 1, 7 (num_tokens - 1) >= d_model, or decay outside (0, 1].
    """

    table_VD: Tensor

    def __init__(self, vocab_size: int, d_model: int, num_tokens: int = 2, decay: float = 0.8) -> None:
        super().__init__()
        if vocab_size < 1 or d_model < 1:
            raise ValueError(f"vocab_size ({vocab_size}) and d_model ({d_model}) must be >= 1")
        if num_tokens < 1 or SHIFT * (num_tokens - 1) >= d_model:
            most = (d_model - 1) // SHIFT + 1
            raise ValueError(f"context_tokens ({num_tokens}) must be >= 1 and <= {most} with d_model {d_model}")
        if not 0 < decay <= 1:
            raise ValueError(f"context_decay ({decay}) must be > 0 and <= 1")
        self.num_tokens, self.decay = num_tokens, decay
        draw = torch.Generator().manual_seed(SEED)
        table_VD = torch.randn(vocab_size, d_model, generator=draw, dtype=torch.float32, device="cpu")
        self.register_buffer("table_VD", F.rms_norm(table_VD, (d_model,)).to(torch.get_default_dtype()))

    def state_specs(self) -> tuple[StateSpec, ...]:
        """The last J - 1 ids, each plus 1, in float32 whatever the weights are; 0 where there was no token."""
        return (StateSpec("ids", ("batch", self.num_tokens - 1)),) if self.num_tokens > 1 else ()

    def empty_state(self, batch_size: int) -> State:
        """The state before the first token."""
        shape = (batch_size, self.num_tokens - 1)
        return tuple(self.table_VD.new_zeros(shape, dtype=torch.float32) for _ in self.state_specs())

    def forward(self, token_BT: Tensor, mask_BT: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        place_BT = token_BT + 1
        if mask_BT is not None:
            place_BT = place_BT * mask_BT
        (before,) = state or self.empty_state(len(token_BT)) or (place_BT[:, :0],)
        place_BS = torch.cat([before.to(place_BT.dtype), place_BT], dim=1)
        # Row 0 is that of no token.
        row_VD = F.pad(self.table_VD, (0, 0, 1, 0))
        num_before, num_tokens = self.num_tokens - 1, token_BT.shape[1]
        sum_BTD = self._weighted(row_VD, 0)[place_BT]
        for back in range(1, self.num_tokens):
            earlier_BT = place_BS[:, num_before - back : num_before - back + num_tokens]
            sum_BTD = sum_BTD + self._weighted(row_VD, back)[earlier_BT]
        kept = (place_BS[:, num_tokens:].to(before.dtype),) if num_before else ()
        return F.rms_norm(sum_BTD, sum_BTD.shape[-1:]), kept

    def _weighted(self, row_VD: Tensor, back: int) -> Tensor:
        return self.decay**back * row_VD.roll(SHIFT * back, dims=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        table_VD = self.table_VD
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table_VD = self.table_VD if table_VD.is_meta else moved(table_VD, self.table_VD)
        return self

    def affinities(self, direction_ED: Tensor) -> Tensor:
        """What each id at each place adds to a score before the norm: decay^j <roll(R[v], 7 j), direction_e>.

        Args:
            direction_ED: float [E, D], as a router's :class:`~trix.outputs.Directions` have it.

        Returns:
            float [E, J, V], the token itself first.
        """
        rows = [self._weighted(self.table_VD, back) for back in range(self.num_tokens)]
        return torch.einsum("jvd,ed->ejv", torch.stack(rows), direction_ED.to(self.table_VD.dtype))

    def extra_repr(self) -> str:
        vocab_size, d_model = self.table_VD.shape
        return f"{vocab_size}, {d_model}, num_tokens={self.num_tokens}, decay={self.decay}"
