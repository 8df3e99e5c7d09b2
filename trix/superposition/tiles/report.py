"""All that is known of a layer's tiles by the latents of an autoencoder, each figure next to its control.

Legend: N tokens, K latents, E tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from trix.nn import TriXBlock, TriXFFN
from trix.nn.routed_layer import RoutedLayer
from trix.routing.router import SignatureRouter
from trix.superposition.backends.base_model import RESIDUAL, Site
from trix.superposition.backends.trix_model import TriXBackend
from trix.superposition.tiles.alignment import Alignment, signature_alignment
from trix.superposition.tiles.causal import CausalCheck, Decides, at_block, at_router, causal_check, decided_by
from trix.superposition.tiles.contingency import Contingency, Information, contingency, information
from trix.superposition.tiles.information import tile_entropy
from trix.superposition.tiles.insertion import InsertionComparison, insertion_against_steering
from trix.superposition.tiles.probe import ROUTER_IN, ProbeScores, tile_probe
from trix.superposition.tiles.traffic import BoolArray, DecodingCoder, Traffic, decoder_rows, read_traffic, with_tiles_of

if TYPE_CHECKING:
    from trix.superposition.dump import ActivationDump

LATENTS_OF_TILE = 8
PROBE_LATENTS_OF_TILE = 4
TOKENS_OF_TILE = 8
TOKENS_OF_LATENT = 5
PASSAGES_OF_TILE = 4
TOKENS_BEFORE, TOKENS_AFTER = 24, 12
INSERTION_TEXTS = 16
BLOCK_DRAWS, BLOCK_TOKENS = 3, 32  # a block runs on whole documents


class TokenShare(NamedTuple):
    """A token id, and its share of the tokens or of the activation of something."""

    token: int
    share: float


class ClaimedToken(NamedTuple):
    """A token id. share: of the tile's tokens. claimed: the share of all of its occurrences that go to the tile."""

    token: int
    share: float
    claimed: float


class Passage(NamedTuple):
    """A token of a document with those around it, as ids."""

    before: list[int]
    token: int
    after: list[int]


class TileLatent(NamedTuple):
    """A latent that is enriched on a tile. documents: those in which it is active. hits: those of them whose
    token of its largest activation has the tile; control_hits: those of which a random token has it. tokens: where its
    activation is."""

    latent: int
    documents: int
    hits: int
    control_hits: int
    q: float
    pmi: float
    tokens: list[TokenShare]


class TileReading(NamedTuple):
    """A tile.

    share: of all tokens. tokens: the most frequent ones; the share of the first is the purity. passages: where its top latent
    is most active on a token of the tile, each of another document. plus, minus: dimensions of its signature; empty without
    one.
    """

    tile: int
    share: float
    tokens: list[ClaimedToken]
    passages: list[Passage]
    latents: list[TileLatent]
    plus: list[int]
    minus: list[int]


@dataclass(frozen=True)
class TileReport:
    """What :func:`tile_report` found.

    Attributes:
        site: what the autoencoder reads. layer: the layer that the tiles belong to. decided: what the router reads. num_tokens,
            num_documents: all that were read; 30 % of the documents are held out. tile_bits: H(tile). given_token_bits:
            H(tile | token), 0 where the token decides. permuted_bits: the same of tiles in random order. found, shifted: tests
            of the training documents, with tiles as they are and shifted. bits: information between latents and tiles.
            readings: tile by tile. signature_width: 0 without signatures. top_latent_E: the most enriched latent, -1 for none.
        probe, causal, alignment, top_alignment, insertion: None where they are not defined; notes say why.
        inserted: latent and tile of the insertion. notes: remarks for the reader, one line each.
    """

    site: Site
    layer: int
    decided: Decides
    num_tokens: int
    num_documents: int
    tile_bits: float
    given_token_bits: float
    permuted_bits: float
    found: Contingency
    shifted: Contingency
    bits: Information
    readings: list[TileReading]
    signature_width: int
    top_latent_E: list[int]
    probe: ProbeScores | None
    causal: CausalCheck | None
    alignment: Alignment | None
    top_alignment: Alignment | None
    insertion: InsertionComparison | None
    inserted: tuple[int, int] | None
    notes: list[str]

    @property
    def is_by_token_alone(self) -> bool:
        """Whether the token's id decides the tile, by what the router reads or in all tokens looked at. These say nothing of
        that where all go to one tile, or where no token comes twice."""
        return self.decided == "token" or self.given_token_bits == 0 < self.permuted_bits


def tile_report(
    backend: TriXBackend,
    sae: DecodingCoder,
    dump: "ActivationDump",
    layer: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
) -> TileReport:
    """Read the tiles of a layer by the latents of an autoencoder.

    Enriched latents are found on 70 % of the documents; the probe and the causal check are made on the others. The autoencoder
    itself may have learned from all of them.

    Args:
        dump: the activations that the autoencoder reads, of this model. layer: by default that of the dump; for another one the
            model runs again, and contingency and information are all that is defined. num_tokens: as for
            :func:`~.traffic.read_traffic`. seed: seed of every draw.

    Raises:
        ValueError: a layer without tiles, a single document, and as :func:`~.traffic.read_traffic`.
    """
    identity = dump.manifest.identity
    site = Site(identity.layer, identity.site)
    layer = site.layer if layer is None else layer
    block = cast(TriXBlock, backend.block(layer))
    decided = decided_by(block)
    routed = cast(RoutedLayer, block.ffn)
    traffic = read_traffic(sae, dump, routed.router.num_tiles, num_tokens)
    if layer != site.layer:
        traffic = with_tiles_of(traffic, backend, layer, routed.router.num_tiles)
    training, held_out = traffic.split(seed=seed)
    found = contingency(training, seed)
    top_latent_E = [(found.top_latents(tile, 1) or [-1])[0] for tile in range(traffic.num_tiles)]
    tile_bits, given_token_bits = tile_entropy(traffic.tile_N), tile_entropy(traffic.tile_N, traffic.token_N)
    signature_ED = routed.get_tile_signatures() if isinstance(routed.router, SignatureRouter) else None
    is_at_router = site == Site(layer, ROUTER_IN)
    latents = sorted({latent for tile in range(traffic.num_tiles) for latent in found.top_latents(tile, PROBE_LATENTS_OF_TILE)})
    permuted_bits = tile_entropy(np.random.default_rng(seed).permutation(traffic.tile_N), traffic.token_N)
    insertion, inserted = None, None
    notes = [
        *_notes_on_routing(decided, tile_bits, given_token_bits, permuted_bits),
        *_notes_on_site(site, layer),
        *(_notes_on_layer(site, routed, held_out) if decided == "hidden" and layer == site.layer else ()),
    ]
    row_KD = decoder_rows(sae)
    alignment, top_alignment = None, None
    if is_at_router and decided == "hidden" and signature_ED is not None:
        alignment = signature_alignment(signature_ED, row_KD, site, seed=seed)
        top_alignment = signature_alignment(signature_ED, row_KD, site, top_latent_E, seed=seed)
    if alignment is not None and isinstance(routed, TriXFFN) and latents:
        inserted = _inserted(found, training)
        try:
            insertion = insertion_against_steering(backend, site, sae, *inserted, lambda: _batches(held_out))
        except ValueError as error:  # such as no scale with as large a KL, which is no reason to lose all the rest
            notes.append(f"latent {inserted[0]} inserted into tile {inserted[1]} could not be compared: {error}")
    return TileReport(
        site=site,
        layer=layer,
        decided=decided,
        num_tokens=traffic.num_tokens,
        num_documents=len(traffic.starts_P),
        tile_bits=tile_bits,
        given_token_bits=given_token_bits,
        permuted_bits=permuted_bits,
        found=found,
        shifted=contingency(training.shifted(seed), seed),
        bits=information(training, seed),
        readings=[_reading(traffic, found, tile, signature_ED) for tile in range(traffic.num_tiles)],
        signature_width=0 if signature_ED is None else signature_ED.shape[1],
        top_latent_E=top_latent_E,
        probe=tile_probe(training, held_out, latents, site, seed) if is_at_router and latents else None,
        causal=_causal(held_out, sae, block, top_latent_E, site, layer, seed) if decided == "hidden" else None,
        alignment=alignment,
        top_alignment=top_alignment,
        insertion=insertion,
        inserted=inserted,
        notes=notes,
    )


def _notes_on_routing(decided: Decides, tile_bits: float, given_token_bits: float, permuted_bits: float) -> Iterator[str]:
    if tile_bits == 0:
        yield "all tokens go to one tile: there is no choice for latents to explain"
    if decided == "token":
        yield "routed by the token alone: latents say no more of tiles than of tokens, and removing one changes no tile"
    elif given_token_bits == 0 < permuted_bits:
        yield "routed by the token alone, as far as these texts show: each token id goes to one tile"
    if decided == "context":
        yield "routed on a code of the last tokens that no gradient moves: the choice does not depend on hidden states"


def _notes_on_site(site: Site, layer: int) -> Iterator[str]:
    if layer != site.layer:
        yield f"latents are of {site}, tiles of layer {layer}: probe, causal check, alignment and insertion need one layer"
    elif site.name != ROUTER_IN:
        yield f"latents are of {site}: probe, alignment and insertion are defined at {ROUTER_IN}.{layer} only"


def _notes_on_layer(site: Site, routed: RoutedLayer, held_out: Traffic) -> Iterator[str]:
    if site.name not in (ROUTER_IN, RESIDUAL):
        yield f"the causal check is defined at {ROUTER_IN} and {RESIDUAL}, not at {site.name}"
    if site.name == RESIDUAL and not held_out.has_whole_documents():
        yield "the causal check runs the block on whole documents: tokens were left out of the dump"
    if site.name != ROUTER_IN:
        return
    kind, reads = type(routed.router).__name__, ", ".join(sorted(routed.router.reads))
    if reads:
        yield f"the causal check needs a router that reads activations alone: {kind} reads {reads}"
    if not isinstance(routed.router, SignatureRouter):
        yield f"alignment and insertion need signatures: {kind} has none"
    elif not isinstance(routed, TriXFFN):
        yield f"insertion is defined for TriXFFN, not for {type(routed).__name__}"


def _causal(
    held_out: Traffic,
    sae: DecodingCoder,
    block: TriXBlock,
    top_latent_E: list[int],
    site: Site,
    layer: int,
    seed: int,
) -> CausalCheck | None:
    routed = cast(RoutedLayer, block.ffn)
    if site == Site(layer, ROUTER_IN) and not routed.router.reads:
        return causal_check(held_out, sae, top_latent_E, at_router(held_out, routed), seed=seed)
    if site == Site(layer, RESIDUAL) and held_out.has_whole_documents():
        choose = at_block(held_out, block)
        return causal_check(held_out, sae, top_latent_E, choose, num_draws=BLOCK_DRAWS, max_tokens=BLOCK_TOKENS, seed=seed)
    return None


def _inserted(found: Contingency, training: Traffic) -> tuple[int, int]:
    """The latent that says most of a single tile, and the tile with the fewest tokens, which loses least."""
    weight_KE = np.where(found.is_discovery_KE, found.count_KE * np.where(found.count_KE > 0, found.pmi_KE, 0), -np.inf)
    tokens_E = np.bincount(training.tile_N, minlength=training.num_tiles)
    return int(weight_KE.max(axis=1).argmax()), int(tokens_E.argmin())


def _batches(held_out: Traffic) -> list[dict[str, Tensor]]:
    documents = range(min(INSERTION_TEXTS, len(held_out.starts_P)))
    token_BT, mask_BT = held_out.padded(documents, torch.from_numpy(held_out.token_N))
    return [{"input_ids": token_BT, "attention_mask": mask_BT.long()}]


def _reading(traffic: Traffic, found: Contingency, tile: int, signature_ED: Tensor | None) -> TileReading:
    is_own_N = traffic.tile_N == tile
    shares = _shares(traffic.token_N[is_own_N], np.ones(int(is_own_N.sum())), TOKENS_OF_TILE)
    tokens = [ClaimedToken(*one, float(is_own_N[traffic.token_N == one.token].mean())) for one in shares]
    latents = tile_latents(traffic, found, tile)
    signs = [] if signature_ED is None else signature_ED[tile].sign().int().tolist()
    plus, minus = ([place for place, sign in enumerate(signs) if sign == wanted] for wanted in (1, -1))
    passages = _passages(traffic, is_own_N, latents[0].latent) if latents else []
    return TileReading(tile, float(is_own_N.mean()), tokens, passages, latents, plus, minus)


def _passages(traffic: Traffic, is_own_N: BoolArray, latent: int) -> list[Passage]:
    z_N = traffic.latent_NK[:, latent].toarray().ravel() * is_own_N
    order = np.argsort(-z_N, kind="stable")[: int((z_N > 0).sum())]
    _, first = np.unique(traffic.document_N[order], return_index=True)
    passages = []
    for row in order[np.sort(first)[:PASSAGES_OF_TILE]]:
        around = slice(max(row - TOKENS_BEFORE, 0), row + TOKENS_AFTER + 1)
        token, document = traffic.token_N[around], traffic.document_N[around]
        place = row - around.start
        before, after = token[:place][document[:place] == document[place]], token[place + 1 :]
        passages.append(Passage(before.tolist(), int(token[place]), after[document[place + 1 :] == document[place]].tolist()))
    return passages


def tile_latents(traffic: Traffic, found: Contingency, tile: int, num_latents: int = LATENTS_OF_TILE) -> list[TileLatent]:
    """The latents that are enriched on a tile, the strongest first; see :meth:`~.contingency.Contingency.top_latents`."""
    return [_tile_latent(traffic, found, tile, latent) for latent in found.top_latents(tile, num_latents)]


def _tile_latent(traffic: Traffic, found: Contingency, tile: int, latent: int) -> TileLatent:
    z_N = traffic.latent_NK[:, latent].tocoo()
    return TileLatent(
        latent=latent,
        documents=int(found.num_documents_K[latent]),
        hits=int(found.hits_KE[latent, tile]),
        control_hits=int(found.control_hits_KE[latent, tile]),
        q=float(found.q_KE[latent, tile]),
        pmi=float(found.pmi_KE[latent, tile]),
        tokens=_shares(traffic.token_N[z_N.row], z_N.data, TOKENS_OF_LATENT),
    )


def _shares(token_S: np.ndarray, weight_S: np.ndarray, num_tokens: int) -> list[TokenShare]:
    if len(token_S) == 0:
        return []
    total_V = np.bincount(token_S, weights=weight_S)
    top = np.argsort(-total_V, kind="stable")[:num_tokens]
    return [TokenShare(int(token), float(total_V[token] / total_V.sum())) for token in top if total_V[token] > 0]
