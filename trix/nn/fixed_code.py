"""Codes of the last few tokens, which no gradient moves: what signatures read with ``route_on: context``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.autocast import without_autocast
from trix.outputs import State, StateSpec
from trix.routing.facts import moved

SHIFT = 7  # places; tells the tokens of a code apart
# Unlikely as the seed of a model, whose first weights would otherwise equal the codes.
SEED = 20_261_129


class FixedCode(nn.Module, ABC):
    """c[t] = RMSnorm(sum_{j < J} decay^j roll(r[t - j], 7 j)), r[t] the vector of token t by a table of random rows.

    The rows are drawn from a normal distribution with a seed of their own and scaled to root mean square 1: codes of the same
    sizes have the same rows. Nothing trains them, so signatures that stay where they are send the same J tokens to the same
    tile for ever. Tokens before the first one and padding contribute 0. Casts leave the table in at least float32, and autocast
    leaves the sum in the table's dtype, so that rounding changes no tile.

    Args:
        num_rows: V. d_model: D. num_tokens: J, the token itself among them. decay: factor on the weight from a token to the
            one before it.

    Class attribute:
        size_name: what num_rows is called by the kind of code.

    Attributes:
        table_VD: float [V, D]; in the state_dict.

    Shape:
        x: as the kind of code says; [B, T] comes first. mask_BT: bool, False for padding; None: there is none. state: as
        :meth:`state_specs`; None at the beginning of the sequences. Returns (float [B, T, D], the new state).

    Raises:
        ValueError: num_rows, d_model or num_tokens < 1, 7 (num_tokens - 1) >= d_model, or decay outside (0, 1].
    """

    size_name: ClassVar[str]
    table_VD: Tensor

    def __init__(self, num_rows: int, d_model: int, num_tokens: int, decay: float) -> None:
        super().__init__()
        if num_rows < 1 or d_model < 1:
            raise ValueError(f"{self.size_name} ({num_rows}) and d_model ({d_model}) must be >= 1")
        if num_tokens < 1 or SHIFT * (num_tokens - 1) >= d_model:
            most = (d_model - 1) // SHIFT + 1
            raise ValueError(f"context_tokens ({num_tokens}) must be >= 1 and <= {most} with d_model {d_model}")
        if not 0 < decay <= 1:
            raise ValueError(f"context_decay ({decay}) must be > 0 and <= 1")
        self.num_tokens, self.decay = num_tokens, decay
        draw = torch.Generator().manual_seed(SEED)
        table_VD = torch.randn(num_rows, d_model, generator=draw, dtype=torch.float32, device="cpu")
        self.register_buffer("table_VD", F.rms_norm(table_VD, (d_model,)).to(torch.get_default_dtype()))

    @abstractmethod
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The last J - 1 tokens as :meth:`_masked` gives them; nothing where J is 1."""

    @property
    @abstractmethod
    def state_dtype(self) -> torch.dtype:
        """The dtype of the state."""

    @abstractmethod
    def _masked(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The tokens in a form in which 0 stands for no token: [B, T, ...]."""

    @abstractmethod
    def _embed(self, token: Tensor, row_VD: Tensor) -> Tensor:
        """The vectors of masked tokens by these rows: [B, T, D], 0 where there is no token."""

    def empty_state(self, batch_size: int) -> State:
        """The state before the first token."""
        shapes = [(batch_size, *map(int, spec.shape[1:])) for spec in self.state_specs()]
        return tuple(self.table_VD.new_zeros(shape, dtype=self.state_dtype) for shape in shapes)

    def forward(self, x: Tensor, mask_BT: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        token = self._masked(x, mask_BT)
        batch_size, length = token.shape[:2]  # len() would become a constant in an exported graph
        (before,) = state or self.empty_state(batch_size) or (token[:, :0],)
        known = torch.cat([before.to(token.dtype), token], dim=1)
        num_before = self.num_tokens - 1
        with without_autocast(self.table_VD):
            sum_BTD = self._embed(token, self._weighted(0))
            for back in range(1, self.num_tokens):
                earlier = known[:, num_before - back : num_before - back + length]
                sum_BTD = sum_BTD + self._embed(earlier, self._weighted(back))
            code_BTD = F.rms_norm(sum_BTD, sum_BTD.shape[-1:])
        return code_BTD, (known[:, length:].to(before.dtype),) if num_before else ()

    def _weighted(self, back: int) -> Tensor:
        return self.decay**back * self.table_VD.roll(SHIFT * back, dims=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        table_VD = self.table_VD
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table_VD = self.table_VD if table_VD.is_meta else moved(table_VD, self.table_VD)
        return self

    def affinities(self, direction_ED: Tensor) -> Tensor:
        """What each row at each place adds to a score before the norm: decay^j <roll(row_v, 7 j), direction_e>.

        Args:
            direction_ED: float [E, D], as a router's :class:`~trix.outputs.Directions` have it.

        Returns:
            float [E, J, V], the token itself first.
        """
        rows = [self._weighted(back) for back in range(self.num_tokens)]
        return torch.einsum("jvd,ed->ejv", torch.stack(rows), direction_ED.to(self.table_VD.dtype))

    def extra_repr(self) -> str:
        num_rows, d_model = self.table_VD.shape
        return f"{num_rows}, {d_model}, num_tokens={self.num_tokens}, decay={self.decay}"
