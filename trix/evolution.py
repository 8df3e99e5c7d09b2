"""Tiles that are merged, split, drawn anew: what a routed layer can do to its own structure, as functions on a TriXFFN.

The number of tiles, and so the shape of every parameter, stays: merging two tiles frees a slot, which a split or a re-seeding
fills again. So optimizers, checkpoints and compiled graphs go on; :func:`reset_tile_state` and :func:`copy_tile_state` keep an
optimizer's memory of a tile in step with it. What an act would change in the gates of other tokens is held in the router's
``log_mass_E`` and ``is_free_E`` (:class:`~trix.routing.router.SignatureRouter`).

Every act is checked first, so that an error leaves the layer as it was; it is written to the surgery history; and it moves no
frozen signature: one that stands in the way is an error, to be unfrozen by whoever froze it. Fresh values come from torch's
global generator on the CPU. When to act is the caller's policy.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trix.functional import signatures
from trix.functional.ternary import threshold_ternary
from trix.nn.ffn import TriXFFN
from trix.nn.hierarchical import HierarchicalTriXFFN
from trix.routing.router import SIGNATURE_THRESHOLD, SignatureRouter
from trix.routing.surgery import ALL_TILES, SignatureSurgery

ENTRY_MARGIN = 1.0


@torch.no_grad()
def merge_tiles(ffn: TriXFFN, keep_idx: int, drop_idx: int, tag: str = "") -> None:
    """Send the tokens of two tiles to the one that is kept; the other's slot is free, with fresh values in it.

    mass[keep] += mass[drop]; bias[keep] = max of both. Where signatures and weights of the two are equal, the layer computes
    what it did, up to the rounding of a softmax. Where they are not, the tokens of the dropped tile get the kept tile's output.

    Raises:
        ValueError: routing without signatures, a packed layer, more than one tile per token (a token that names both would
            have to name another), the same tile twice, one that does not exist or is free, or drop_idx frozen.
    """
    router = _router_of_one_tile(ffn, "merge")
    _check_pair(router, "keep_idx", keep_idx, "drop_idx", drop_idx)
    _check_in_use(router, "keep_idx", keep_idx)
    _check_in_use(router, "drop_idx", drop_idx)
    _check_not_frozen(router, "drop_idx", drop_idx)
    router.log_mass_E[keep_idx] = torch.logaddexp(router.log_mass_E[keep_idx], router.log_mass_E[drop_idx])
    router.balance_bias[keep_idx] = torch.maximum(router.balance_bias[keep_idx], router.balance_bias[drop_idx])
    _draw(ffn, router, drop_idx)
    router.occupy(drop_idx, float(router.balance_bias[keep_idx]))
    router.free(drop_idx)
    _finish(ffn, "merge", keep_idx, tag, dropped=drop_idx)


@torch.no_grad()
def split_tile(ffn: TriXFFN, source_idx: int, target_idx: int, tag: str = "") -> None:
    """Copy a tile's signature, weights and bias to another slot, so that the two can come to share its tokens.

    mass[source] = mass[target] = mass[source] / 2: with a free target the layer computes what it did, up to the rounding of a
    softmax. A target in use is given up: its tokens go elsewhere, and it no longer counts in the gates of the others.

    Explicit signatures get equal ternary values from different raw ones: the target's are drawn anew between 0 and the
    source's, on the same side of the threshold, so that the two part as they learn. The balance bias makes them take turns
    until then.

    Raises:
        ValueError: routing without signatures, a packed layer, more than one tile per token, the same tile twice, one that does
            not exist, source_idx free, target_idx frozen, or source_idx frozen under emergent routing (its weights, which are
            what is copied, do not give its signature).
    """
    router = _router_of_one_tile(ffn, "split")
    _check_pair(router, "source_idx", source_idx, "target_idx", target_idx)
    _check_in_use(router, "source_idx", source_idx)
    _check_not_frozen(router, "target_idx", target_idx)
    if router.source == "emergent":
        _check_not_frozen(router, "source_idx", source_idx)
    for parameter in tile_parameters(ffn):
        parameter[target_idx] = parameter[source_idx]
    if router.raw_signatures is not None:
        router.raw_signatures[target_idx] = _redrawn_within_cells(router.raw()[source_idx])
    router.is_free_E[target_idx] = False
    router.balance_bias[target_idx] = router.balance_bias[source_idx]
    router.balance_age_E[[source_idx, target_idx]] = 0.0
    router.log_mass_E[source_idx] -= math.log(2.0)
    router.log_mass_E[target_idx] = router.log_mass_E[source_idx]
    router.note_surgery()
    _finish(ffn, "split", source_idx, tag, target=target_idx)


@torch.no_grad()
def reseed_tile(ffn: TriXFFN, tile_idx: int, tag: str = "") -> None:
    """Draw a tile anew, signature and weights; a free slot is in use again. For a tile that gets no tokens.

    It enters with mass 1 and a balance bias 1 below the lowest of the others (1 is the standard deviation of the score of a
    random signature where x has unit variance), so that it takes few tokens at first, and more as balancing draws them to it.
    This does not keep the function: the tokens that it takes or had get another output, and the others' gates change by its
    part in their sum.

    Raises:
        ValueError: routing without signatures, a packed layer, or a tile that does not exist or is frozen.
    """
    router = _router(ffn)
    router.check_tile(tile_idx)
    _check_not_frozen(router, "tile_idx", tile_idx)
    others_E = ~router.is_free_E
    others_E[tile_idx] = False  # a tile that is itself the lowest must not sink with every draw
    lowest_bias = float(router.balance_bias[others_E].min()) if others_E.any() else 0.0
    _draw(ffn, router, tile_idx)
    router.occupy(tile_idx, lowest_bias - ENTRY_MARGIN)
    _finish(ffn, "reseed", tile_idx, tag)


def raise_k(ffn: TriXFFN, tag: str = "") -> None:
    """One more tile per token: top_k + 1; with adaptive k, max_k + 1, which only tokens of low confidence make use of.

    This does not keep the function: every token (adaptive: of low confidence) gains a term.

    Raises:
        ValueError: routing without signatures, a packed layer, or no further tile in use or in reach of the probes.
    """
    router = _router(ffn)
    router.raise_k()
    ffn.surgery_log.record("raise_k", ALL_TILES, tag, top_k=router.top_k)


@torch.no_grad()
def redundant_pairs(ffn: TriXFFN, min_cosine: float = 0.95) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of tiles in use whose signatures have a cosine >= min_cosine, most alike first.

    Such tiles answer to the same tokens and take turns at them, by the balance bias; so each has learned from all of them.

    Raises:
        ValueError: min_cosine outside [-1, 1], or routing without signatures.
    """
    if not -1.0 <= min_cosine <= 1.0:
        raise ValueError(f"min_cosine ({min_cosine}) must be >= -1 and <= 1")
    in_use_E = ~_router(ffn).is_free_E
    return [(i, j) for i, j, _ in signatures.redundant_pairs(ffn.get_tile_signatures(), min_cosine, in_use_E)]


def tile_parameters(ffn: TriXFFN) -> list[nn.Parameter]:
    """The parameters of which a tile owns a row, [E, ...]: explicit signatures, and the weights of the tiles."""
    raw = getattr(ffn.router, "raw_signatures", None)
    return [*([] if raw is None else [raw]), *ffn.tiles.tile_parameters()]


@torch.no_grad()
def reset_tile_state(optimizer: Optimizer, ffn: TriXFFN, tile_idx: int) -> None:
    """Forget what the optimizer remembers of a tile: its rows of every state tensor of the parameter's shape become 0.

    That covers momentum and the moments of Adam; the count of steps belongs to the whole parameter and stays, so that Adam's
    first updates of the tile are up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times its learning rate.
    """
    for value in _states(optimizer, tile_parameters(ffn)):
        value[tile_idx] = 0


@torch.no_grad()
def reset_signature_state(optimizer: Optimizer, layer: SignatureSurgery, tile_idx: int) -> None:
    """Forget what the optimizer remembers of one tile's explicit signature, as :func:`reset_tile_state`, but of nothing else.

    For a signature that was inserted, while the tile keeps its weights. An emergent one has no parameter of its own.
    """
    router = layer.router
    if isinstance(router, SignatureRouter) and router.raw_signatures is not None:
        for value in _states(optimizer, [router.raw_signatures]):
            value[tile_idx] = 0


@torch.no_grad()
def copy_tile_state(optimizer: Optimizer, ffn: TriXFFN, source_idx: int, target_idx: int) -> None:
    """Let the optimizer remember of the target what it does of the source; see :func:`reset_tile_state`."""
    for value in _states(optimizer, tile_parameters(ffn)):
        value[target_idx] = value[source_idx]


def _states(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [
        value
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]


def _redrawn_within_cells(raw_D: Tensor) -> Tensor:
    """Other raw values with the same ternary form, nearer to the threshold, or anywhere below it where the form is 0."""
    ternary_D = threshold_ternary(raw_D, SIGNATURE_THRESHOLD)
    share_D = 0.05 + 0.9 * torch.rand(raw_D.shape).to(raw_D)
    active_D = ternary_D * (SIGNATURE_THRESHOLD + (raw_D.abs() - SIGNATURE_THRESHOLD) * share_D)
    drawn_D = torch.where(ternary_D == 0, SIGNATURE_THRESHOLD * (2.0 * share_D - 1.0), active_D)
    return torch.where(threshold_ternary(drawn_D, SIGNATURE_THRESHOLD) == ternary_D, drawn_D, raw_D)


def _draw(ffn: TriXFFN, router: SignatureRouter, tile_idx: int) -> None:
    if router.raw_signatures is not None:
        router.raw_signatures[tile_idx] = router.draw()[tile_idx].to(router.raw_signatures)
    is_drawn_E = torch.zeros_like(router.is_free_E)
    is_drawn_E[tile_idx] = True
    ffn.tiles.redraw(is_drawn_E)


def _finish(ffn: TriXFFN, operation: str, tile_idx: int, tag: str, **details: int) -> None:
    if isinstance(ffn, HierarchicalTriXFFN):
        ffn.recluster()
    ffn.surgery_log.record(operation, tile_idx, tag, **details)


def _router(ffn: TriXFFN) -> SignatureRouter:
    router = ffn.router
    if not isinstance(router, SignatureRouter):
        raise ValueError(f"the router ({type(router).__name__}) must be a SignatureRouter: routing 'explicit' or 'emergent'")
    if router.packed_signatures is not None or any(weight.is_packed for weight in ffn.tiles.ternary_weights()):
        raise ValueError("the layer is packed: unpack it before changing its tiles")
    return router


def _router_of_one_tile(ffn: TriXFFN, operation: str) -> SignatureRouter:
    router = _router(ffn)
    if router.top_k != 1:
        name = "max_k" if router.is_adaptive else "top_k"
        raise ValueError(f"{name} ({router.top_k}) must be 1 to {operation} tiles: no other layer can keep its function")
    return router


def _check_pair(router: SignatureRouter, name: str, tile_idx: int, other_name: str, other_idx: int) -> None:
    router.check_tile(tile_idx)
    router.check_tile(other_idx)
    if tile_idx == other_idx:
        raise ValueError(f"{name} ({tile_idx}) must differ from {other_name} ({other_idx})")


def _check_in_use(router: SignatureRouter, name: str, tile_idx: int) -> None:
    if router.is_free_E[tile_idx]:
        raise ValueError(f"{name} ({tile_idx}) must be a tile in use, not a free slot")


def _check_not_frozen(router: SignatureRouter, name: str, tile_idx: int) -> None:
    if router.is_frozen(tile_idx):
        raise ValueError(f"the signature of {name} ({tile_idx}) must not be frozen: unfreeze it first")
