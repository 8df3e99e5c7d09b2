"""One tile of a report: its signature, its neighbours, how much comes to it, what that is, and where it stood."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trix.introspection.ngrams import CountedText, NgramClaims
from trix.introspection.page import code, strip, table
from trix.introspection.sample import Sample
from trix.nn.routed_layer import RoutedLayer
from trix.outputs import RoutingDecision
from trix.routing.claims import ClaimMatrix

NEAREST_TILES = 3
CLASSES_PER_TILE = 6
CONTEXTS_PER_TILE = 4
NGRAMS_PER_TILE = 8
MIN_OCCURRENCES = 5  # a class seen less often is too rare to speak of who claims it
# Contexts are told apart as they are made; more than so many are not tried for one that is new.
MAX_CONTEXTS_TRIED = 200

HOW_TO_READ = (
    ("badge", "frozen: training can no longer change the signature; free: a merger left the slot, no token can go there"),
    ("coloured strip", "the signature, one bar per dimension: orange +1 (plus), blue -1 (minus), light 0 (zero)"),
    ("nearest tiles", "those with the most similar signatures: the cosine is 1 for the same signature, 0 for unrelated ones"),
    ("usage", "the share of all assignments of tokens to tiles that this tile got"),
    (
        "table",
        "what came most often. Of this tile: its share of the tile's tokens. Of all such: how much of all of it came here",
    ),
    ("purity", "how much of what came is of one kind: the share of the most frequent one"),
    (
        "most claimed",
        f"what came here most exclusively, of all that occurs at least {MIN_OCCURRENCES} times: how much of it came here",
    ),
    ("examples", "tokens that landed here, those with the highest scores first, marked where they stand"),
)
HOW_TO_READ_NGRAMS = (
    (
        "n-grams",
        "what the tile answers to, as the signatures alone say: the token that comes here, with those before it, and the share "
        "of the counted text that each takes, the largest first. A sign ⊢ stands where the text had not begun",
    ),
    ("predicted", "the usage that follows from the signatures and the counts of n-grams, without running the model"),
)


@dataclass(frozen=True)
class NgramReading:
    """What a layer of a model that routes on context makes of n-grams: those of a text, and those of the sample itself."""

    counted: CountedText
    claims: NgramClaims
    claims_of_sample: NgramClaims


@dataclass(frozen=True)
class LayerReading:
    """What the cards of one layer are written from.

    similarity_EE, usage_E: of signatures, of assignments. remark_E: HTML that is added to the card of each tile, or None.
    """

    layer: RoutedLayer
    decision: RoutingDecision
    signature_ED: Tensor
    similarity_EE: Tensor
    usage_E: Tensor
    claims: ClaimMatrix
    ngrams: NgramReading | None = None
    remark_E: Sequence[str] | None = None


def count_claims(decision: RoutingDecision, num_tiles: int, sample: Sample) -> ClaimMatrix:
    """How the tokens of each class are spread over the tiles; assignments of weight 0 are not counted."""
    # The sample is of this process alone.
    claims = ClaimMatrix(num_tiles, len(sample.class_names), sync_on_compute=False)
    claims.update(decision.tile_idx.cpu(), sample.label_N.cpu(), weight=decision.weight.cpu())
    return claims


def is_counted(decision: RoutingDecision) -> Tensor:
    """bool [T]: not padding, whose tiles all have weight 0."""
    return (decision.weight != 0).any(dim=-1)


def tile_card(reading: LayerReading, tile: int, sample: Sample) -> str:
    """The card, as HTML."""
    layer, usage = reading.layer, float(reading.usage_E[tile])
    states = (("frozen", layer.frozen_tiles()), ("free", layer.free_slots()))
    badges = "".join(f' <span class="badge">{name}</span>' for name, is_so_E in states if is_so_E[tile])
    bar = f'<div class="bar"><div style="width:{min(usage, 1):.1%}"></div></div>'
    signature_D = reading.signature_ED[tile]
    return (
        f'<div class="tile"><h4>Tile {tile}{badges}</h4>{_ngrams(reading, tile)}{strip(signature_D.cpu().numpy())}'
        f'<div class="muted">{_counts(signature_D)}</div>{_nearest(reading.similarity_EE[tile], tile)}'
        f"<p>usage: {usage:.1%}{_predicted(reading, tile)}</p>{bar}{_traffic(reading, tile, sample)}"
        f"{'' if reading.remark_E is None else reading.remark_E[tile]}</div>"
    )


def _ngrams(reading: LayerReading, tile: int) -> str:
    if reading.ngrams is None:
        return ""
    claims, counted = reading.ngrams.claims, reading.ngrams.counted
    found = claims.of_tile(tile, NGRAMS_PER_TILE)
    shown = " ".join(f"{code(counted.written(ids))}&nbsp;{share:.1%}" for ids, share in found)
    more = int(claims.is_claimed(tile).sum()) - len(found)
    return f"<p>n-grams: {shown or 'none'}{f' and {more:,} more' if more else ''}</p>"


def _predicted(reading: LayerReading, tile: int) -> str:
    return "" if reading.ngrams is None else f" (predicted: {float(reading.ngrams.claims.rates()[tile]):.1%})"


def _traffic(reading: LayerReading, tile: int, sample: Sample) -> str:
    decision, count_C = reading.decision, reading.claims.count_EC[tile]
    landed = ((decision.tile_idx == tile) & (decision.weight != 0)).any(dim=-1).nonzero().flatten()
    if not len(landed):
        return "<p>No token landed here.</p>"
    rate_C, num_assigned = reading.claims.compute()[tile], int(count_C.sum())
    common = [c for c in count_C.argsort(descending=True, stable=True)[:CLASSES_PER_TILE].tolist() if count_C[c]]
    names = sample.class_names
    rows = [(code(names[c]), f"{int(count_C[c]) / num_assigned:.0%}", f"{float(rate_C[c]):.0%}") for c in common]
    kinds = table((sample.class_kind, "of this tile", "of all such"), rows)
    purity = f"<p>purity: {float(reading.claims.purity()[tile]):.0%}</p>"
    strongest = landed[decision.score[landed, tile].argsort(descending=True)][:MAX_CONTEXTS_TRIED].tolist()
    return kinds + purity + _most_claimed(reading, tile, sample) + sample.contexts(strongest, CONTEXTS_PER_TILE)


def _most_claimed(reading: LayerReading, tile: int, sample: Sample) -> str:
    """The classes of which this tile gets most, and more than an equal share; nothing where the table holds most classes."""
    if len(sample.class_names) <= 2 * CLASSES_PER_TILE:
        return ""
    is_frequent_C = reading.claims.count_EC.sum(dim=0) >= MIN_OCCURRENCES
    rate_C = torch.where(is_frequent_C, reading.claims.compute()[tile], 0.0)
    top = rate_C.argsort(descending=True, stable=True)[:CLASSES_PER_TILE].tolist()
    equal_share = 1 / len(reading.usage_E)
    shown = [f"{code(sample.class_names[c])}&nbsp;{float(rate_C[c]):.0%}" for c in top if rate_C[c] > equal_share]
    return f"<p>most claimed: {' '.join(shown)}</p>" if shown else ""


def _counts(signature_D: Tensor) -> str:
    named = ((1, "plus"), (-1, "minus"), (0, "zero"))
    return ", ".join(f"{int((signature_D == value).sum())} {name}" for value, name in named)


def _nearest(similarity_E: Tensor, tile: int) -> str:
    order = [other for other in similarity_E.argsort(descending=True, stable=True).tolist() if other != tile]
    nearest = ", ".join(f"{other} ({float(similarity_E[other]):.2f})" for other in order[:NEAREST_TILES])
    return f'<div class="muted">nearest tiles: {nearest}</div>' if nearest else ""
