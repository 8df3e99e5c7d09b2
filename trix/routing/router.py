"""Routers: which tiles a token goes to, and how much each one counts."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trix.functional.autocast import without_autocast
from trix.functional.gates import Gate, softmax_weight
from trix.functional.packing import check_packed, pack_ternary, packed_width, unpack_ternary
from trix.functional.signatures import inverse_sqrt_active, signature_diversity_loss, signature_scores
from trix.functional.ternary import straight_through, threshold_ternary
from trix.functional.tile_matmul import select_top_k, signature_route
from trix.outputs import Directions, RoutingDecision, RowContext
from trix.routing.balance import ALL_STEPS, balance_nudge
from trix.routing.base_router import Router
from trix.routing.facts import Fact, Facts, check_counts, check_finite

MASS_DECAY = 0.99
PACE_OF_FROZEN = 10.0  # the earlier a token changes its tile, the less training is lost
SIGNATURE_THRESHOLD = 0.3  # |raw| above it counts as +1 or -1


class SignatureRouter(Router):
    """Send each token to the K tiles whose ternary signatures agree with it most.

    score[t, e] = <x_t, s_e> / sqrt(nnz(s_e)): the agreement per active dimension (unit: activation standard deviations).

    Signatures are raw values, ternarised by a threshold of 0.3 with a straight-through gradient that reaches them through the
    gate. ``explicit`` ones are parameters; ``emergent`` ones are read from the tiles' weights by the caller. A frozen
    signature is a stored value that replaces either, so no optimizer can move it.

    Tiles that were merged or split (:mod:`trix.evolution`) leave two marks, so that the gates of all tokens stay as they were:
    weight[t, k] = exp(score[t, e]) / sum_f mass_f exp(score[t, f]) * sqrt(E), e = tile_idx[t, k], where mass is 1 for a new
    tile; after a merger or a split, the log-mass decays by 1 % per training batch. A free slot (``is_free_E``) has score -inf
    and is never chosen.

    Shape:
        x_TD: float; returns a RoutingDecision. Scores are computed in at least float32, whatever autocast says.

    Which signatures are frozen and to what, which slots are free, the masses and the number of times that k was raised are
    facts (:class:`~trix.routing.facts.Facts`): no averaging, cast or sharding of weights moves them.

    Where all signatures are frozen, the balance bias need not wait for them to settle. It moves by the ratio of the loads
    (:func:`~trix.routing.balance.balance_nudge`), and each training batch counts as ten: it moves ten times as far and rests
    after 20 batches. A signature that is inserted frozen has a bias at rest.

    ``gate``: ``softmax`` is the gate above. ``ones`` weighs each chosen tile 1, for tiles that were cut out of one layer
    (:mod:`trix.upcycling`): all of them together are that layer. Its gradient is that of the softmax gate.

    Raises:
        ValueError: top_k > num_tiles; another gate, or ``ones`` together with max_k; x or the emergent signatures of a wrong
            size; emergent ones missing or not wanted; by load_state_dict, frozen values outside {-1, 0, +1}, masses that are
            not finite, or fewer tiles in use than top_k.

    Ties go to the lowest tile index, so results agree across devices and instruction sets.
    """

    raw_signatures: nn.Parameter | None
    is_frozen_E = Fact[Tensor]()
    frozen_value_ED = Fact[Tensor]()
    is_free_E = Fact[Tensor]()
    log_mass_E = Fact[Tensor]()
    num_raised = Fact[int]()
    packed_signatures: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_tiles: int,
        top_k: int = 1,
        balance_rate: float = 0.01,
        source: Literal["explicit", "emergent"] = "explicit",
        gate: Literal["softmax", "ones"] = "softmax",
        **settings: Any,
    ) -> None:
        super().__init__(d_model, num_tiles, top_k, balance_rate, **settings)
        if source not in ("explicit", "emergent"):
            raise ValueError(f"source ({source!r}) must be 'explicit' or 'emergent'")
        if gate not in ("softmax", "ones"):
            raise ValueError(f"gate ({gate!r}) must be 'softmax' or 'ones'")
        if gate == "ones" and self.is_adaptive:
            raise ValueError(f"gate ({gate!r}) must be 'softmax' where max_k ({self._first_top_k}) chooses k token by token")
        self.source, self.gate = source, gate
        explicit = nn.Parameter(self.draw()) if source == "explicit" else None
        self.register_parameter("raw_signatures", explicit)
        self.register_buffer("packed_signatures", None)
        self.hold("is_frozen_E", torch.zeros(num_tiles, dtype=torch.bool))
        self.hold("frozen_value_ED", torch.zeros(num_tiles, d_model, dtype=torch.int8))
        self.hold("is_free_E", torch.zeros(num_tiles, dtype=torch.bool))
        self.hold("log_mass_E", torch.zeros(num_tiles, dtype=torch.float32))
        self.hold("num_raised", 0)

    @property
    def top_k(self) -> int:
        """Tiles per token; with adaptive k, at most."""
        return self._first_top_k + self.num_raised

    def signatures(self, emergent_ED: Tensor | None = None) -> Tensor:
        """The ternary signatures in force, [E, D] in {-1, 0, +1}; ``emergent_ED`` is what the tiles' weights say."""
        if self.packed_signatures is not None:
            return unpack_ternary(self.packed_signatures, self.d_model).to(self.balance_bias.dtype)
        return threshold_ternary(self.raw(emergent_ED), SIGNATURE_THRESHOLD)

    def raw(self, emergent_ED: Tensor | None = None) -> Tensor:
        """What the ternary signatures are taken from, [E, D], with the frozen values in their places."""
        if (emergent_ED is None) != (self.source == "explicit"):
            needs = "takes none" if self.source == "explicit" else "needs them"
            raise ValueError(
                f"emergent signatures given: {emergent_ED is not None}; a router of source {self.source!r} {needs}"
            )
        raw_ED = self.raw_signatures if emergent_ED is None else emergent_ED
        assert raw_ED is not None
        if raw_ED.shape != (self.num_tiles, self.d_model):
            raise ValueError(f"signatures {tuple(raw_ED.shape)} must have shape {(self.num_tiles, self.d_model)}")
        return torch.where(self.is_frozen_E.unsqueeze(-1), self.frozen_value_ED.to(raw_ED.dtype), raw_ED)

    def draw(self) -> Tensor:
        """Fresh initial values of explicit signatures, [E, D]: about half of the positions are active."""
        return torch.randn(self.num_tiles, self.d_model) * 0.5

    def diversity_loss(self, target_diversity: float = 0.5, emergent_ED: Tensor | None = None) -> Tensor:
        """relu(target_diversity - diversity of the signatures in force), with gradient to all that are not frozen."""
        return signature_diversity_loss(self.raw(emergent_ED), SIGNATURE_THRESHOLD, target_diversity)

    @torch.no_grad()
    def insert(self, tile_idx: int, signature_D: Tensor, freeze: bool = True) -> None:
        """Replace the signature of one tile; see :meth:`trix.routing.surgery.SignatureSurgery.insert_signature`.

        The balance bias that the old signature had earned is dropped for the mean of all tiles. If the new one is frozen, its
        bias is at rest at once.
        """
        self._check_change(tile_idx)
        if tuple(signature_D.shape) != (self.d_model,):
            raise ValueError(f"signature {tuple(signature_D.shape)} must have shape {(self.d_model,)}")
        is_bad_D = ~((signature_D == 0) | (signature_D == 1) | (signature_D == -1))
        if bool(is_bad_D.any()):
            position = int(is_bad_D.nonzero()[0])
            raise ValueError(f"signature[{position}] ({signature_D[position].item()}) must be -1, 0 or 1")
        if not freeze and self.raw_signatures is None:
            raise ValueError(
                f"freeze ({freeze}) must be True for a router of source {self.source!r}: "
                "its signatures are read from the tiles' weights, which an inserted one does not change"
            )
        if freeze or self.raw_signatures is None:
            self.frozen_value_ED[tile_idx] = signature_D.to(self.frozen_value_ED)
        else:
            self.raw_signatures[tile_idx] = signature_D.to(self.raw_signatures)
        self.is_frozen_E[tile_idx] = freeze
        self.occupy(tile_idx, float(self.balance_bias[~self.is_free_E].mean()))
        if freeze:
            self.balance_age_E[tile_idx] = ALL_STEPS

    @torch.no_grad()
    def freeze(self, tile_idx: int, emergent_ED: Tensor | None = None) -> None:
        """Hold the signature of one tile at its present ternary value, whatever the optimizer does. Idempotent."""
        self._check_change(tile_idx)
        self.frozen_value_ED[tile_idx] = self.signatures(emergent_ED)[tile_idx].to(torch.int8)
        self.is_frozen_E[tile_idx] = True
        self.note_surgery()

    @torch.no_grad()
    def freeze_all(self, emergent_ED: Tensor | None = None) -> None:
        """As :meth:`freeze`, of every tile in use."""
        self._check_unpacked()
        self.frozen_value_ED.copy_(self.signatures(emergent_ED).to(torch.int8))
        self.is_frozen_E |= ~self.is_free_E
        self.note_surgery()

    @torch.no_grad()
    def unfreeze(self, tile_idx: int) -> None:
        """Let one signature learn again: an explicit one goes on from the frozen value, an emergent one is read again."""
        self._check_change(tile_idx)
        if self.raw_signatures is not None and bool(self.is_frozen_E[tile_idx]):
            self.raw_signatures[tile_idx] = self.frozen_value_ED[tile_idx].to(self.raw_signatures.dtype)
        self.is_frozen_E[tile_idx] = False
        self.note_surgery()

    @torch.no_grad()
    def unfreeze_all(self) -> None:
        """As :meth:`unfreeze`, of every tile."""
        self._check_unpacked()
        if self.raw_signatures is not None:
            frozen_ED = self.frozen_value_ED.to(self.raw_signatures.dtype)
            self.raw_signatures.copy_(torch.where(self.is_frozen_E.unsqueeze(-1), frozen_ED, self.raw_signatures))
        self.is_frozen_E.fill_(False)
        self.note_surgery()

    def is_frozen(self, tile_idx: int) -> bool:
        self.check_tile(tile_idx)
        return bool(self.is_frozen_E[tile_idx])

    @torch.no_grad()
    def occupy(self, tile_idx: int, balance_bias: float) -> None:
        """Let a slot be chosen, with mass 1, this bias and age 0, whether it was free or not."""
        self.is_free_E[tile_idx] = False
        self.log_mass_E[tile_idx] = 0.0
        self.balance_age_E[tile_idx] = 0.0
        self.balance_bias[tile_idx] = balance_bias
        self.note_surgery()

    @torch.no_grad()
    def remove(self, tile_idx: int) -> None:
        """Make the slot of a tile free: see :meth:`trix.routing.surgery.SignatureSurgery.remove_tile`."""
        self._check_change(tile_idx)
        if self.is_free_E[tile_idx]:
            raise ValueError(f"tile_idx ({tile_idx}) must be a tile in use, not a free slot")
        if self.is_frozen_E[tile_idx]:
            raise ValueError(f"the signature of tile_idx ({tile_idx}) must not be frozen: unfreeze it first")
        if self.k_limit - 1 < self.top_k:
            raise ValueError(f"tiles in use and in reach after it ({self.k_limit - 1}) must be >= top_k ({self.top_k})")
        self.free(tile_idx)

    @torch.no_grad()
    def free(self, tile_idx: int) -> None:
        """Let a slot not be chosen any more, without a check."""
        self.log_mass_E[tile_idx] = 0.0
        self.is_free_E[tile_idx] = True
        self.note_surgery()

    def note_surgery(self) -> None:
        """Say that somebody has changed the facts: they are this router's own, and its averages follow."""
        self.stand_alone()
        self.note_change()

    @property
    def k_limit(self) -> int:
        """How many tiles there are to choose from, at least."""
        return self._k_limit(self.is_free_E)

    def _k_limit(self, is_free_E: Tensor) -> int:
        return self.num_tiles - int(is_free_E.sum())

    @torch.no_grad()
    def raise_k(self) -> None:
        """One more tile per token (with adaptive k: at most one more); the state_dict keeps it.

        Raises:
            ValueError: there are no more tiles.
        """
        if self.top_k >= self.k_limit:
            raise ValueError(f"top_k ({self.top_k + 1}) must be <= the number of tiles in use and in reach ({self.k_limit})")
        self.num_raised += 1
        self.note_surgery()

    def check_tile(self, tile_idx: int) -> None:
        """Raises ValueError unless the tile exists."""
        if not 0 <= tile_idx < self.num_tiles:
            raise ValueError(f"tile_idx ({tile_idx}) must be >= 0 and < num_tiles ({self.num_tiles})")

    def _check_change(self, tile_idx: int) -> None:
        self.check_tile(tile_idx)
        self._check_unpacked()

    def _check_unpacked(self) -> None:
        if self.packed_signatures is not None:
            raise ValueError("the router is packed: unpack the layer before changing its signatures")

    def pack_signatures(self, emergent_ED: Tensor | None = None) -> None:
        """Store the signatures in force as packed codes and route by ``trix::signature_route`` from now on."""
        if self.packed_signatures is None:
            self.packed_signatures = pack_ternary(self.signatures(emergent_ED).detach())

    def unpack_signatures(self) -> None:
        """Return to the signatures' own source."""
        self.packed_signatures = None

    @torch.no_grad()
    def _nudge(self, tile_idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor | None:
        if self.balance_rate == 0:
            return None
        return balance_nudge(
            tile_idx_TK, self.num_tiles, self.balance_rate, weight_TK, ~self.is_free_E, is_by_ratio=self._are_all_frozen
        )

    def _shared(self, move_E: Tensor) -> Tensor:
        # A frozen tile keeps its standing among those that learn: it gets the mean move, whatever tokens it claims. Where all
        # are frozen, each gets its own move until it is at rest. Free slots have no part in it.
        in_use_E = ~self.is_free_E
        mean_move = (move_E * in_use_E).sum() / in_use_E.sum().clamp_min(1)
        is_held_E = self.is_frozen_E & (~self._are_all_frozen | (self.balance_age_E >= ALL_STEPS))
        return torch.where(is_held_E, mean_move, move_E) * in_use_E

    @torch.no_grad()
    def _after(self, num_batches: int, nudge_E: Tensor | None) -> dict[str, Tensor]:
        # The masses that mergers and splits left behind go a little way back to 1.
        return super()._after(num_batches, nudge_E) | {"log_mass_E": self.log_mass_E * MASS_DECAY**num_batches}

    def _pace(self) -> Tensor | float:
        return torch.where(self._are_all_frozen, PACE_OF_FROZEN, 1.0)

    @property
    def _are_all_frozen(self) -> Tensor:
        """Whether every tile in use has a frozen signature: bool, a scalar."""
        return (self.is_frozen_E | self.is_free_E).all()

    @property
    def needs_votes(self) -> bool:
        return self.source == "emergent" and self.packed_signatures is None

    def explain(self, emergent_ED: Tensor | None = None) -> Directions:
        """s_e / sqrt(nnz(s_e)), and the balance bias, -inf for a free slot."""
        signature_ED = self.signatures(emergent_ED).detach()
        direction_ED = signature_ED * inverse_sqrt_active(signature_ED).unsqueeze(-1)
        return Directions(direction_ED, self.balance_bias.masked_fill(self.is_free_E, -torch.inf))

    def frozen_tiles(self) -> Tensor:
        return self.is_frozen_E.clone()

    def free_slots(self) -> Tensor:
        return self.is_free_E.clone()

    def describe(self) -> str:
        if self._are_all_frozen:
            return "Signatures choose the tiles; all of them are frozen."
        if self.source == "explicit":
            return "Signatures choose the tiles; they are learned apart from the tiles' weights (explicit routing)."
        return "Signatures choose the tiles; they are read from the tiles' own weights (emergent routing)."

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        del context  # signatures are compared with the stream alone
        if self.packed_signatures is not None:
            return self._route_packed(x_TD, self.packed_signatures)
        tile_idx_TK, score_TE = self.select(x_TD, emergent_ED)
        return self._decide(score_TE, tile_idx_TK)

    def select(self, x_TD: Tensor, emergent_ED: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The choice without the gate: tile_idx int64 [T, K], and score [T, E] without the bias, -inf for a free slot."""
        if self.packed_signatures is not None:
            tile_idx_TK, _, score_TE = self._route_packed(x_TD, self.packed_signatures)
            return tile_idx_TK, score_TE
        self._check_width(x_TD)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        with without_autocast(x_TD):
            # Added, as to fill by a mask takes four times as long.
            score_TE = signature_scores(x_TD, self.signatures(emergent_ED).to(x_TD.dtype)).add_(self.exclusion_E)
        return select_top_k(score_TE.detach() + self.balance_bias, self.top_k), score_TE

    @property
    def exclusion_E(self) -> Tensor:  # noqa: N802
        """What added to scores takes free slots out: -inf for these, 0 for the other tiles."""
        return torch.zeros_like(self.balance_bias).masked_fill(self.is_free_E, -torch.inf)

    def _route_packed(self, x_TD: Tensor, packed: Tensor) -> RoutingDecision:
        """All by one operator."""
        self._check_width(x_TD)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        bias_E = self.balance_bias + self.exclusion_E
        arguments = (self.top_k, int(self._packed_gate), self.confidence_threshold)
        with without_autocast(x_TD):
            decision = RoutingDecision(*signature_route(x_TD, packed, bias_E, self.log_mass_E, *arguments))
        weight_TK = torch.ones_like(decision.weight) if self.gate == "ones" else decision.weight
        return decision._replace(weight=weight_TK, score=decision.score + self.exclusion_E)

    @property
    def _packed_gate(self) -> Gate:
        return Gate.ADAPTIVE if self.is_adaptive else Gate.SOFTMAX

    def _gate(self, score_TE: Tensor, tile_idx_TK: Tensor) -> Tensor:
        weight_TK = softmax_weight(score_TE, tile_idx_TK, self.log_mass_E)
        return straight_through(torch.ones_like(weight_TK), weight_TK) if self.gate == "ones" else weight_TK

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed = state_dict.get(prefix + "packed_signatures")
        # A buffer that is None is not loaded: take the mode of the state that comes.
        self.packed_signatures = None
        if packed is not None:
            shape = (self.num_tiles, packed_width(self.d_model))
            if tuple(packed.shape) != shape:
                raise ValueError(f"packed signatures {tuple(packed.shape)} must have shape {shape}")
            check_packed(packed, self.d_model)
            self.packed_signatures = torch.empty_like(packed, device=self.balance_bias.device)
        check_frozen_facts(self, state_dict, prefix, FROZEN_FACTS, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        if name == "frozen_value_ED" and value.is_floating_point():  # a file from before they were ternary
            check_finite(name, value)
            value = threshold_ternary(value, SIGNATURE_THRESHOLD).to(torch.int8)
        checked = super()._checked(name, value)
        if name == "num_raised":
            check_counts(name, checked)
        elif name == "frozen_value_ED" and not -1 <= int(value.min()) <= int(value.max()) <= 1:
            raise ValueError(f"frozen_value_ED ({int(value[(value < -1) | (value > 1)][0])}) must be -1, 0 or 1")
        return checked

    def _check_together(self, values: dict[str, Any]) -> None:
        if values["is_free_E"].is_meta:
            return
        limit, top_k = self._k_limit(values["is_free_E"]), self._first_top_k + values["num_raised"]
        if limit < top_k:
            raise ValueError(f"tiles in use and in reach by is_free_E ({limit}) must be >= top_k by num_raised ({top_k})")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, source={self.source}, frozen={int(self.is_frozen_E.sum())}"


FROZEN_FACTS = ("is_frozen_E", "frozen_value_ED")


def check_frozen_facts(
    module: Facts, state_dict: dict[str, Any], prefix: str, names: tuple[str, ...], error_msgs: list[str]
) -> None:
    """Report a state_dict that has something of the module, but not these entries: it would thaw what is frozen, unnoticed."""
    own = {*module._modules, *module._parameters, *module._buffers, *module.held_values()}
    has_any = any(key.startswith(prefix) and key[len(prefix) :].split(".")[0] in own for key in state_dict)
    missing = [prefix + name for name in names if prefix + name not in state_dict]
    if has_any and missing:
        error_msgs.append(
            f"weights of a routed layer must come with its frozen signatures and its history: {', '.join(missing)} missing"
        )


UNHEEDED = "the signatures shown are read from the tiles' weights and decide nothing."


class LearnedRouter(Router):
    """The control: a float gate matrix trained like any other, score = W x, everything else as in SignatureRouter."""

    def __init__(self, d_model: int, num_tiles: int, top_k: int = 1, balance_rate: float = 0.01, **settings: Any) -> None:
        super().__init__(d_model, num_tiles, top_k, balance_rate, **settings)
        self.gate_ED = nn.Parameter(torch.randn(num_tiles, d_model) / math.sqrt(d_model))

    def explain(self, emergent_ED: Tensor | None = None) -> Directions:  # noqa: ARG002
        """The gate's rows, and the balance bias."""
        return Directions(self.gate_ED.detach(), self.balance_bias)

    def describe(self) -> str:
        return f"A learned float gate chooses the tiles; {UNHEEDED}"

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        del context, emergent_ED
        self._check_width(x_TD)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        with without_autocast(x_TD):
            return self._decide(x_TD @ self.gate_ED.to(x_TD.dtype).T)
