"""The vocabulary between layers: what is known of tokens, what a router decides, what a layer reports and adds to the loss.

Shape suffixes in the whole package: B batch, T tokens, D model width, E tiles, K chosen tiles, H hidden width of a tile,
C classes, N output rows, P packed bytes of a row.
"""

from typing import NamedTuple, TypedDict

from torch import Tensor


class TokenContext(NamedTuple):
    """What is known of the tokens besides their stream x_BTD. Each may be None.

    token_BT: int64, their ids. mask_BT: bool, False for padding. embedding_BTD: float, their embeddings; what a router reads
    instead of its layer's own input. code_BTD: float, codes of the last few tokens, which a router reads instead of either with
    ``route_on: context``; see :class:`~trix.nn.fixed_code.FixedCode`. phase_BT: float, what the block's mixer says of each
    token; a resolvent says arg G, in radians from 0 to pi. is_causal: no token may look at later ones. is_running_BT: bool,
    False for tokens whose computation has ended: see :class:`~trix.nn.halting.Halting`.
    """

    token_BT: Tensor | None = None
    mask_BT: Tensor | None = None
    embedding_BTD: Tensor | None = None
    phase_BT: Tensor | None = None
    is_causal: bool = True
    is_running_BT: Tensor | None = None
    code_BTD: Tensor | None = None


class RowContext(NamedTuple):
    """What a router may read of T tokens besides their stream x_TD; each is None where it is not known.

    token_T: int64, their ids. phase_T: float, what the block's mixer says of each token.
    """

    token_T: Tensor | None = None
    phase_T: Tensor | None = None


class StateSpec(NamedTuple):
    """One tensor of what a mixer keeps of the tokens that it has read.

    shape: sizes; "batch" stands for the number of texts, "past" for the number of tokens read. "batch" comes first.
    """

    name: str
    shape: tuple[int | str, ...]


State = tuple[Tensor, ...]  # one tensor for each StateSpec, in the same order


class Directions(NamedTuple):
    """What decides about a token x: the tile e of the highest <x, direction_e> + bias_e.

    direction_ED: float [E, D]. bias_E: float [E], -inf for a tile that cannot be chosen.
    """

    direction_ED: Tensor
    bias_E: Tensor


class RoutingDecision(NamedTuple):
    """Which tiles each token goes to.

    tile_idx: int64 [T, K] in [0, E), best first. weight: float [T, K], the factor on each chosen tile's output; a tile of
    weight 0 is named only to keep the shape and is not used (adaptive k).
    score: float [T, E], the agreement of token and signature (unit: activation standard deviations), without balance bias.
    """

    tile_idx: Tensor
    weight: Tensor
    score: Tensor


class RoutingInfo(TypedDict):
    """What a routed layer reports, in the shape of its input ([B, T, ...] or [B, ...]).

    tile_idx: int64 [..., K]. weight: float [..., K], 0 for a tile that is not used. scores: float [..., E], -inf for a tile
    that a hierarchical search did not take into account.
    """

    tile_idx: Tensor
    weight: Tensor
    scores: Tensor


class LookupInfo(TypedDict):
    """What a sparse lookup layer reports, in the shape of its input.

    tile_idx: int64 [...], or [..., K] with more than one tile per token. weight: float, the same shape, the gate on the tile's
    output. compressed: float [..., 2] in (-1, 1), where the
    token stands in the plane of the splines. scores: float [..., E].
    """

    tile_idx: Tensor
    weight: Tensor
    compressed: Tensor
    scores: Tensor


class AuxLosses(TypedDict):
    """Auxiliary losses, each a scalar already multiplied by its weight; a disabled one is exactly 0.

    balance: pressure toward equal load. ternary: toward signature values in {-1, 0, +1}. sparsity: toward few active dimensions
    in a signature. diversity: toward signatures that differ. total_aux: the sum, to be added to the task's loss.
    """

    balance: Tensor
    ternary: Tensor
    sparsity: Tensor
    diversity: Tensor
    total_aux: Tensor


class LayerOutput(NamedTuple):
    """What a sublayer makes of the stream: x_BTD float; routing and aux are None where it has no tiles."""

    x_BTD: Tensor
    routing: RoutingInfo | None = None
    aux: AuxLosses | None = None
