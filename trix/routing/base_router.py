"""What every router shares: the choice, the gate, and the balance, which moves when a batch is done."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trix.functional.gates import adaptive_weight
from trix.functional.tile_matmul import select_top_k
from trix.outputs import Directions, RoutingDecision, RowContext
from trix.routing.balance import balance_nudge, check_weights, step_at
from trix.routing.facts import Fact, Facts, check_counts, moved
from trix.routing.pending import Pending

AGE = "balance_age_E"  # the fact that files from before the bias came to rest do not have


class Router(Facts, ABC):
    """What every router shares: exact top-k selection, the gate, and the balance bias.

    tile_idx = top_k of score + balance_bias (ties to the lowest index);
    weight[t, k] = softmax(score_t)[tile_idx[t, k]] * sqrt(E).

    sqrt(E) keeps the weight near 1 at initialisation, where the softmax over E tiles is nearly flat. Routing itself
    changes nothing; training calls :meth:`add_batch`, and :meth:`settle` once no backward pass will route the batch again.
    The bias stays in at least float32 under casts: narrower floats would lose its small steps.

    The bias comes to rest: each batch moves that of a tile by balance_rate * step_factor * step(age) * sign(mean load - load),
    where step is 1 for the first 100 training batches of the tile and then falls to 0 at batch 200
    (:func:`~trix.routing.balance.step_at`). From then on the balance loss holds the load alone. A tile that surgery puts in
    use starts anew. The age is a fact (:class:`~trix.routing.facts.Facts`), which files from before do not have: it is 0 there.

    With ``max_k``, k is chosen token by token: 1 where the gap between the best two scores exceeds ``confidence_threshold``,
    else 2, up to max_k (see :func:`~trix.functional.gates.adaptive_k`). A decision then always names max_k tiles; the unused
    ones have weight 0, and the weights of the used ones are a softmax among themselves: they sum to 1. So a token that is sure
    of its tile sends no gradient through the gate.

    Class attributes:
        reads: what of the context it needs: {"token"}, {"phase"}, or nothing; a block checks it when it is made.
        reads_stream: whether the stream has a say in the choice, as x_TD or by way of the phase.

    Attributes:
        balance_age_E: float32 [E], the training batches of each tile that moved the bias, each counted by its step_factor.
        step_factor: float32 scalar on the CPU, 1 unless a training sets it: the present learning rate as a part of its peak. A
            tensor, so that compiled graphs need not be made anew; it is no part of the state_dict.

    A configuration makes it as ``Router(d_model, num_tiles, top_k=..., balance_rate=..., max_k=..., confidence_threshold=...,
    **routing_args)``.

    Shape:
        x_TD: float; context: see RowContext; emergent_ED: what the tiles' weights say, where :attr:`needs_votes`. Returns a
        RoutingDecision.

    Raises:
        ValueError: top_k or max_k outside [1, num_tiles], both given, confidence_threshold < 0, or balance_rate < 0; by
            load_state_dict, a balance bias of NaN, and as :class:`~trix.routing.facts.Facts`.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    reads_stream: ClassVar[bool] = True
    balance_bias: Tensor
    balance_age_E = Fact[Tensor]()

    def __init__(
        self,
        d_model: int,
        num_tiles: int,
        top_k: int = 1,
        balance_rate: float = 0.01,
        *,
        max_k: int | None = None,
        confidence_threshold: float = 0.3,
    ) -> None:
        super().__init__()
        if d_model < 1 or num_tiles < 1:
            raise ValueError(f"d_model ({d_model}) and num_tiles ({num_tiles}) must be >= 1")
        if not 1 <= top_k <= num_tiles:
            raise ValueError(f"top_k ({top_k}) must be >= 1 and <= num_tiles ({num_tiles})")
        if max_k is not None and (top_k != 1 or not 1 <= max_k <= num_tiles):
            raise ValueError(f"max_k ({max_k}) must be >= 1 and <= num_tiles ({num_tiles}), and top_k ({top_k}) must then be 1")
        if not confidence_threshold >= 0:
            raise ValueError(f"confidence_threshold ({confidence_threshold}) must be >= 0")
        check_weights(balance_rate=balance_rate)
        self.d_model, self.num_tiles, self.balance_rate = d_model, num_tiles, balance_rate
        self.is_adaptive, self.confidence_threshold = max_k is not None, confidence_threshold
        self._first_top_k = top_k if max_k is None else max_k
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("balance_bias", torch.zeros(num_tiles, dtype=dtype))
        self.hold(AGE, torch.zeros(num_tiles, dtype=torch.float32))
        self.step_factor = torch.ones((), dtype=torch.float32, device="cpu")
        self.pending = Pending()

    @property
    def top_k(self) -> int:
        """Tiles per token; with adaptive k, at most."""
        return self._first_top_k

    @abstractmethod
    def forward(
        self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None
    ) -> RoutingDecision: ...

    @property
    def reads_features(self) -> bool:
        """Whether the choice depends on x_TD itself, and not on a phase or token ids alone."""
        return self.reads_stream and "phase" not in self.reads

    @property
    def needs_votes(self) -> bool:
        """Whether it must be told the tiles' votes, as ``emergent_ED``."""
        return False

    def explain(self, emergent_ED: Tensor | None = None) -> Directions | None:  # noqa: ARG002
        """The directions that decide; None where the choice is not decided by directions."""
        return None

    def frozen_tiles(self) -> Tensor:
        """Which tiles have a frozen signature: bool [E]."""
        return torch.zeros_like(self.balance_bias, dtype=torch.bool)

    def free_slots(self) -> Tensor:
        """Which tiles no token can go to: bool [E]."""
        return torch.zeros_like(self.balance_bias, dtype=torch.bool)

    def pack_signatures(self, emergent_ED: Tensor | None = None) -> None:  # noqa: ARG002
        """Hold in 2 bits what it compares tokens with, if that is ternary. Idempotent, as :meth:`unpack_signatures`."""
        return

    def unpack_signatures(self) -> None:
        """Undo :meth:`pack_signatures`."""
        return

    def describe(self) -> str:
        """How it chooses, in a sentence or two for people."""
        return f"{type(self).__name__} chooses the tiles."

    def _decide(self, score_TE: Tensor, tile_idx_TK: Tensor | None = None) -> RoutingDecision:
        if tile_idx_TK is None:
            tile_idx_TK = select_top_k(score_TE.detach() + self.balance_bias, self.top_k)
        if self.is_adaptive:
            return RoutingDecision(tile_idx_TK, adaptive_weight(score_TE, tile_idx_TK, self.confidence_threshold), score_TE)
        return RoutingDecision(tile_idx_TK, self._gate(score_TE, tile_idx_TK), score_TE)

    def _gate(self, score_TE: Tensor, tile_idx_TK: Tensor) -> Tensor:
        return score_TE.softmax(dim=-1).gather(-1, tile_idx_TK) * math.sqrt(self.num_tiles)

    def update_balance(self, tile_idx_TK: Tensor, weight_TK: Tensor | None = None) -> None:
        """Nudge ``balance_bias`` toward equal load, at once; see the class for the step.

        Assignments of weight 0 are not counted. With several processes the load is that of all of them: every one has to
        call it.
        """
        self._move(self._after(1, self._nudge(tile_idx_TK, weight_TK)))

    def add_batch(self, tile_idx_TK: Tensor, weight_TK: Tensor | None = None) -> None:
        """As :meth:`update_balance`, but nothing moves before :meth:`settle`; the layer calls it once per training batch."""
        self.pending.add(self._nudge(tile_idx_TK, weight_TK))

    def settle(self) -> None:
        """Let the batches that were added move the router, unless a backward pass may still route one of them again."""
        if self.pending.num_batches and not self.pending.is_awaited:
            self._move(self._settled())
            self.pending.clear()

    @torch.no_grad()
    def _nudge(self, tile_idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor | None:
        """What a batch adds to the bias at the full step, whatever the ages of the tiles are: [E]; None for a rate of 0."""
        if self.balance_rate == 0:
            return None
        return balance_nudge(tile_idx_TK, self.num_tiles, self.balance_rate, weight_TK)

    def _settled(self) -> dict[str, Tensor]:
        """What :meth:`settle` would make of the router, by name."""
        return self._after(self.pending.num_batches, self.pending.nudge_E)

    @torch.no_grad()
    def _after(self, num_batches: int, nudge_E: Tensor | None) -> dict[str, Tensor]:
        """What batches with this nudge make of the router, by name."""
        if nudge_E is None:
            return {}
        age_E = self.balance_age_E
        pace = self._pace()
        move_E = self._shared(nudge_E * (step_at(age_E) * self.step_factor * pace))
        return {"balance_bias": self.balance_bias + move_E, AGE: age_E + num_batches * self.step_factor * pace}

    def _pace(self) -> Tensor | float:
        """How many batches each training batch counts as, in the step of the bias and in its age."""
        return 1.0

    def _shared(self, move_E: Tensor) -> Tensor:
        """What each tile gets of the moves of all: its own."""
        return move_E

    @torch.no_grad()
    def _move(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)
        self.note_change()

    def train(self, mode: bool = True) -> Self:
        if not mode:
            self.settle()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias_E = self.balance_bias
        super()._apply(fn, recurse)
        self.balance_bias = self.balance_bias if bias_E.is_meta else moved(bias_E, self.balance_bias)
        if self.pending.nudge_E is not None:
            self.pending.nudge_E = self.pending.nudge_E.to(self.balance_bias.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A file that is written between a forward and its backward holds the batch.
        destination.update({prefix + name: value for name, value in self._settled().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bias_E = state_dict.get(prefix + "balance_bias")
        if bias_E is not None and bool(bias_E.isnan().any() if not bias_E.is_meta else False):
            raise ValueError(f"balance_bias[{int(bias_E.isnan().nonzero()[0])}] (nan) must be a number")
        if bias_E is not None and prefix + AGE not in state_dict:
            state_dict[prefix + AGE] = torch.zeros_like(self.balance_age_E, device=bias_E.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pending.clear()

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        checked = super()._checked(name, value)
        if name == AGE:
            check_counts(name, checked)
        return checked

    def _check_width(self, x_TD: Tensor) -> None:
        if x_TD.shape[-1] != self.d_model:
            raise ValueError(f"last dimension of x ({x_TD.shape[-1]}) must equal d_model ({self.d_model})")

    def extra_repr(self) -> str:
        k = f"max_k={self.top_k}" if self.is_adaptive else f"top_k={self.top_k}"
        return f"d_model={self.d_model}, num_tiles={self.num_tiles}, {k}"
