"""A latent made a signature, compared with the same latent as a steering vector.

Legend: B texts, T tokens, D width, V vocabulary, N tokens that are predicted.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.ternary import threshold_ternary
from trix.nn import TriXBlock, TriXFFN
from trix.routing.router import SIGNATURE_THRESHOLD
from trix.superposition.backends.base_model import Site
from trix.superposition.backends.trix_model import TILE, TriXBackend
from trix.superposition.tiles.causal import decided_by
from trix.superposition.tiles.probe import check_router_in
from trix.superposition.tiles.traffic import DecodingCoder, decoder_rows

RAW_DEVIATION = 0.5  # that of fresh signatures
KL_TOLERANCE = 0.02  # relative
MAX_DOUBLINGS, MAX_SCALES = 12, 24
FIRST_SCALE = 0.25

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]


class Edit(NamedTuple):
    """What an edit does to a model.

    loss: mean loss of the next token, in nats. kl: mean KL(original || edited) of the next token, in nats. kl_where_active: the
    share of the summed KL that falls on tokens on which the latent is active in the original. tiles_changed: share of all
    tokens whose tile of the layer changes. changed_where_active: share of those on which the latent is active.
    """

    loss: float
    kl: float
    kl_where_active: float
    tiles_changed: float
    changed_where_active: float


class InsertionComparison(NamedTuple):
    """An inserted signature against an added decoder row, at equal KL.

    loss: of the original. active: share of the tokens on which the latent is active. claimed: share of the tokens that go to
    the tile with the new signature. claimed_where_active: share of those on which the latent is active. scale: what the decoder
    row is multiplied by.
    """

    loss: float
    active: float
    claimed: float
    claimed_where_active: float
    scale: float
    insertion: Edit
    steering: Edit


class _Run(NamedTuple):
    """Log-probabilities of the next token, what it is, and the tile, of all tokens with one after them."""

    log_p_NV: Tensor
    target_N: Tensor
    tile_N: Tensor


def signature_of_latent(encoder_row_D: Tensor, site: Site) -> Tensor:
    """The ternary signature that a row of an encoder gives: float [D] in {-1, 0, +1}.

    The row is scaled to the root mean square of a fresh signature, 0.5, and cut at the threshold of all signatures, 0.3: so it
    has about as many dimensions as those.

    Raises:
        ValueError: a site other than router_in, or a row that is 0 or not finite.
    """
    check_router_in(site)
    size = encoder_row_D.detach().float().square().mean().sqrt()
    if not 0 < float(size) < float("inf"):
        raise ValueError(f"size of the encoder row ({float(size)}) must be > 0 and finite")
    return threshold_ternary(encoder_row_D.detach().float() / size * RAW_DEVIATION, SIGNATURE_THRESHOLD)


@torch.no_grad()
def insertion_against_steering(
    backend: TriXBackend, site: Site, sae: DecodingCoder, latent: int, tile: int, batches: Batches
) -> InsertionComparison:
    """Insert the signature of a latent into a tile; in place of it, add s W_dec[latent] to what the layer reads at every token.

    The scale s >= 0 is found by bisection, so that both change the model's answers by the same mean KL. The KL jumps where
    tokens change their tile, so the two may differ; both are reported. The scale is 0 where the insertion changes nothing. The
    model itself is left as it was.

    Args:
        site: router_in of a layer of tiles (:class:`~trix.nn.TriXFFN`) that is routed on hidden states. sae: with ``W_enc``.
        tile: the one whose signature is replaced, and whose weights stay. batches: as for
            :func:`~trix.superposition.evaluation.model_fit`; it is asked for many times.

    Raises:
        ValueError: another site, another kind of layer or routing, a latent or tile that does not exist, no token with one
            after it, or no scale with that KL.
    """
    check_router_in(site)
    block = cast(TriXBlock, backend.block(site.layer))
    if not isinstance(block.ffn, TriXFFN) or decided_by(block) != "hidden":
        raise ValueError(f"layer {site.layer} must be a TriXFFN that is routed on hidden states")
    if not 0 <= latent < sae.k:
        raise ValueError(f"latent ({latent}) must be >= 0 and < number of latents ({sae.k})")
    original, is_active_N = _run(backend, site, batches), _is_active(backend, site, sae, latent, batches)
    edited = TriXBackend(copy.deepcopy(backend.model), backend.vocabulary)
    layer = cast(TriXFFN, cast(TriXBlock, edited.block(site.layer)).ffn)
    layer.insert_signature(tile, signature_of_latent(cast(Any, sae).W_enc[:, latent], site), tag=f"latent {latent}")
    inserted = _run(edited, site, batches)
    insertion = _edit(original, inserted, is_active_N)

    row_D = decoder_rows(sae)[latent].to(backend.device)

    def steered(scale: float) -> _Run:
        with _added(cast(TriXFFN, block.ffn), scale * row_D):
            return _run(backend, site, batches)

    scale = _scale_of(insertion.kl, lambda value: _kl_N(original, steered(value)).mean().item())
    is_claimed_N = inserted.tile_N == tile
    return InsertionComparison(
        loss=float(F.nll_loss(original.log_p_NV, original.target_N)),
        active=float(is_active_N.float().mean()),
        claimed=float(is_claimed_N.float().mean()),
        claimed_where_active=_part(is_active_N, is_claimed_N.float()),
        scale=scale,
        insertion=insertion,
        steering=_edit(original, steered(scale), is_active_N),
    )


def _scale_of(target: float, kl_of: Callable[[float], float]) -> float:
    """The scale with the KL nearest to the target, by doubling and bisection."""
    if target == 0:
        return 0.0
    kl_at: dict[float, float] = {}
    low, high = 0.0, FIRST_SCALE
    for _ in range(MAX_DOUBLINGS):
        kl_at[high] = kl_of(high)
        if kl_at[high] >= target:
            break
        low, high = high, 2 * high
    else:
        raise ValueError(f"KL at the largest scale, {low:g} ({kl_at[low]:g}), must be >= that of the insertion ({target:g})")
    while len(kl_at) < MAX_SCALES:
        middle = (low + high) / 2
        kl_at[middle] = kl_of(middle)
        if abs(kl_at[middle] - target) <= KL_TOLERANCE * target:
            break
        low, high = (middle, high) if kl_at[middle] < target else (low, middle)
    return min(kl_at, key=lambda scale: abs(kl_at[scale] - target))


@contextmanager
def _added(layer: TriXFFN, vector_D: Tensor) -> Iterator[None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] + vector_D.to(inputs[0].dtype), *inputs[1:])

    handle = layer.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _run(backend: TriXBackend, site: Site, batches: Batches) -> _Run:
    log_p: list[Tensor] = []
    target: list[Tensor] = []
    tile: list[Tensor] = []
    for batch in batches():
        is_predicted_BT, mask = _is_predicted(batch, backend.device)
        notes: list[Tensor] = []
        handles = backend.watch(Site(site.layer, TILE), (len(mask), mask.shape[1]), notes.append)
        try:
            logits_BTV = backend.run(batch["input_ids"].to(backend.device), None if bool(mask.all()) else mask)
        finally:
            for handle in handles:
                handle.remove()
        log_p.append(F.log_softmax(logits_BTV.float(), dim=-1)[:, :-1][is_predicted_BT])
        target.append(batch["input_ids"].to(backend.device)[:, 1:][is_predicted_BT])
        tile.append(notes[0][:, :-1][is_predicted_BT])
    if sum(map(len, target)) == 0:
        raise ValueError("number of tokens with one after them (0) must be >= 1")
    return _Run(torch.cat(log_p), torch.cat(target), torch.cat(tile))


def _is_active(backend: TriXBackend, site: Site, sae: DecodingCoder, latent: int, batches: Batches) -> Tensor:
    parts: list[Tensor] = []
    for batch in batches():
        is_predicted_BT, _ = _is_predicted(batch, backend.device)
        x_BTD = backend.activations(batch["input_ids"], batch["attention_mask"], [site])[site]
        parts.append(sae.encode(x_BTD[:, :-1][is_predicted_BT].float())[:, latent] > 0)
    return torch.cat(parts)


def _is_predicted(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    mask_BT = batch["attention_mask"].bool().to(device)
    return mask_BT[:, :-1] & mask_BT[:, 1:], mask_BT


def _kl_N(original: _Run, edited: _Run) -> Tensor:  # noqa: N802
    return F.kl_div(edited.log_p_NV, original.log_p_NV, reduction="none", log_target=True).sum(dim=-1).clamp_min(0)


def _edit(original: _Run, edited: _Run, is_active_N: Tensor) -> Edit:
    kl_N, is_changed_N = _kl_N(original, edited), edited.tile_N != original.tile_N
    return Edit(
        loss=float(F.nll_loss(edited.log_p_NV, edited.target_N)),
        kl=float(kl_N.mean()),
        kl_where_active=_part(is_active_N, kl_N),
        tiles_changed=float(is_changed_N.float().mean()),
        changed_where_active=_part(is_active_N, is_changed_N.float()),
    )


def _part(is_active_N: Tensor, weight_N: Tensor) -> float:
    """The share of the weight where the latent is active; NaN without any weight."""
    total = float(weight_N.sum())
    return float(weight_N[is_active_N].sum()) / total if total > 0 else float("nan")
