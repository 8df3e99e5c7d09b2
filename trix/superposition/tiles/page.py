"""The HTML page and the record of a :class:`~trix.superposition.tiles.report.TileReport`."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trix.introspection.page import code, definitions, heading, page, strip, table
from trix.introspection.symbols import visible
from trix.superposition.tiles.alignment import Alignment
from trix.superposition.tiles.causal import CausalCheck
from trix.superposition.tiles.insertion import Edit, InsertionComparison
from trix.superposition.tiles.report import Passage, TileLatent, TileReading, TileReport, TokenShare
from trix.superposition.viz.token_texts import Tokenizer, token_texts

HOW_TO_READ = (
    ("share", "how many of all tokens the tile gets"),
    ("purity", "the share of its tokens that its commonest token has"),
    ("table of tokens", "the share of the tile's tokens, and the share of the token's occurrences that the tile claims"),
    ("passages", "where the first of its latents is most active on a token of the tile, which is marked"),
    ("latents", "those that are active where the tile is chosen more often than chance explains; false discovery rate 5 %"),
    ("hits", "documents in which the token that activates the latent most has the tile"),
    ("control", "documents in which a token drawn at random has the tile"),
    ("pmi", "log2 of how many times more often the two occur together than independent ones would"),
    ("coloured strip", "the signature, one bar per dimension: orange +1 (plus), blue -1 (minus), light 0 (zero)"),
)


def summary_rows(report: TileReport) -> list[tuple[str, str, str]]:
    """(what, figure, its control) of the report, for people."""
    found, shifted, bits = report.found, report.shifted, report.bits
    rows = [
        (
            "latent-tile pairs found",
            f"{found.discovery_rate():.1%} of {int(found.is_tested_KE.sum()):,} tests",
            f"{shifted.discovery_rate():.1%} with tiles shifted within documents",
        ),
        ("tiles with a latent", f"{sum(j >= 0 for j in report.top_latent_E)} of {len(report.readings)}", ""),
        ("I(latent; tile)", f"{_bits(bits.tile_K)}", f"{_bits(bits.control_K)} with tiles shifted within documents"),
        (
            "I(latent; tile | token)",
            f"{_bits(bits.given_token_K)}",
            f"{_bits(bits.given_control_K)} with tiles permuted within tokens",
        ),
        (
            "H(tile | token)",
            f"{report.given_token_bits:.3f} bits",
            f"{report.permuted_bits:.3f} bits with tiles in random order, H(tile) {report.tile_bits:.3f}",
        ),
    ]
    if report.probe is not None:
        probe = report.probe
        control = (
            f"{probe.num_controls} others: as often active {_percent(probe.like_latents)}, at random "
            f"{_percent(probe.random_latents)}; activation {probe.raw:.1%}; majority {probe.majority:.1%}"
        )
        rows.append((f"tile by {probe.num_latents} latents", f"{probe.latents:.1%} of held-out tokens", control))
    if report.causal is not None:
        causal = report.causal
        of_tokens = f"of {int(causal.tokens_E.sum()):,} tokens ({_times(causal.ratio)})"
        rows.append(("top latent removed", f"{_percent(causal.changed)} change tile {of_tokens}", _random_latents(causal)))
    if report.top_alignment is not None and report.alignment is not None:
        for name, alignment in (("top latent aligned", report.top_alignment), ("best latent aligned", report.alignment)):
            null = f"mean cosine {alignment.null_cosine:.3f} with permuted signs"
            aligned = f"{alignment.num_aligned} of {alignment.num_compared} tiles, mean cosine {alignment.cosine:.3f}"
            rows.append((name, aligned, null))
    if report.insertion is not None and report.inserted is not None:
        inserted, steered = report.insertion.insertion, report.insertion.steering
        rows.append((f"latent {report.inserted[0]} inserted", _edit(inserted), f"decoder row added: {_edit(steered)}"))
    return rows


def tile_page(report: TileReport, tokenizer: Tokenizer, facts: Mapping[str, str]) -> str:
    """One offline HTML file. tokenizer: how tokens are written. facts: what to say of the origin, by name."""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    figures = table(("", "found", "control"), [tuple(html.escape(cell) for cell in row) for row in summary_rows(report)])

    cards = "".join(_card(report, reading, tokenizer) for reading in report.readings)
    return page(
        f"Tiles of layer {report.layer} by the latents of {report.site}",
        definitions(facts.items())
        + heading(2, "Figures", "Each next to its control.")
        + figures
        + notes
        + heading(2, "Tiles", "What each tile claims, and the latents that go with it.")
        + definitions(HOW_TO_READ)
        + f'<div class="tiles">{cards}</div>',
    )


def tile_record(report: TileReport, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The report as JSON-like values; numbers that are not finite are None."""
    found, shifted, bits = report.found, report.shifted, report.bits
    record = {
        "provenance": dict(provenance),
        "site": str(report.site),
        "layer": report.layer,
        "decided_by": report.decided,
        "routed_by_the_token_alone": report.is_by_token_alone,
        "notes": report.notes,
        "tokens": report.num_tokens,
        "documents": report.num_documents,
        "contingency": {
            "tests": int(found.is_tested_KE.sum()),
            "discoveries": int(found.is_discovery_KE.sum()),
            "discovery_rate": found.discovery_rate(),
            "shifted_discoveries": int(shifted.is_discovery_KE.sum()),
            "shifted_discovery_rate": shifted.discovery_rate(),
        },
        "bits": {
            "tile": report.tile_bits,
            "tile_given_token": report.given_token_bits,
            "permuted_tile_given_token": report.permuted_bits,
            "latents": {name: {"mean": float(v.mean()), "max": float(v.max())} for name, v in bits._asdict().items()},
        },
        "probe": None if report.probe is None else report.probe._asdict(),
        "causal": None if report.causal is None else _causal_record(report.causal),
        "alignment": _alignment_record(report.alignment),
        "top_latent_alignment": _alignment_record(report.top_alignment),
        "insertion": _insertion_record(report.insertion, report.inserted),
        "tiles": [_reading_record(report, reading) for reading in report.readings],
    }
    cleaned: dict[str, Any] = _finite(record)
    return cleaned


def latent_table(latents: Sequence[TileLatent], tokenizer: Tokenizer) -> str:
    """The latents that are enriched on a tile, as HTML."""
    rows = [
        (
            str(one.latent),
            f"{one.pmi:.1f}",
            f"{one.hits} of {one.documents}",
            str(one.control_hits),
            _written(one.tokens, tokenizer),
        )
        for one in latents
    ]
    return table(("latent", "pmi", "hits", "control", "active on"), rows) if rows else "<p>No latent is enriched here.</p>"


def _written(tokens: Sequence[TokenShare], tokenizer: Tokenizer) -> str:
    texts = token_texts(tokenizer, [token.token for token in tokens])
    return " ".join(f"{code(text)}&nbsp;{token.share:.0%}" for text, token in zip(texts, tokens, strict=True))


def _card(report: TileReport, reading: TileReading, tokenizer: Tokenizer) -> str:
    purity = f", purity {reading.tokens[0].share:.0%}" if reading.tokens else ""
    parts = [
        f"<h4>Tile {reading.tile}</h4>",
        _signature(reading, report.signature_width),
        f"<p>share {reading.share:.1%}{purity}</p>",
        _claims(reading, tokenizer),
        "".join(_passage(passage, tokenizer) for passage in reading.passages),
        latent_table(reading.latents, tokenizer),
        _causal_line(report, reading.tile),
        _alignment_line(report, reading.tile),
    ]
    return f'<div class="tile">{"".join(parts)}</div>'


def _claims(reading: TileReading, tokenizer: Tokenizer) -> str:
    texts = token_texts(tokenizer, [one.token for one in reading.tokens])
    rows = [(code(text), f"{one.share:.0%}", f"{one.claimed:.0%}") for text, one in zip(texts, reading.tokens, strict=True)]
    return table(("token", "of this tile", "of all such"), rows)


def _passage(passage: Passage, tokenizer: Tokenizer) -> str:
    before, token, after = (
        html.escape("".join(" " if text == " " else visible(text) for text in token_texts(tokenizer, ids)))
        for ids in (passage.before, [passage.token], passage.after)
    )
    return f'<div class="context">{before}<mark>{token}</mark>{after}</div>'


def _signature(reading: TileReading, width: int) -> str:
    if width == 0:
        return ""
    signature = np.zeros(width, dtype=np.int64)
    signature[reading.plus], signature[reading.minus] = 1, -1
    lines = (("plus", reading.plus), ("minus", reading.minus))
    dimensions = "".join(f'<div class="muted">{name}: {html.escape(", ".join(map(str, at)))}</div>' for name, at in lines)
    return f"{strip(signature)}<details><summary>dimensions</summary>{dimensions}</details>"


def _causal_line(report: TileReport, tile: int) -> str:
    causal = report.causal
    if causal is None or causal.tokens_E[tile] == 0:
        return ""
    of = int(causal.tokens_E[tile])
    return (
        f"<p>without latent {int(causal.latent_E[tile])}: {int(causal.changed_E[tile])} of {of} tokens change tile; "
        f"without random ones: {causal.random_changed_E[tile]:.1f}</p>"
    )


def _alignment_line(report: TileReport, tile: int) -> str:
    aligned = report.top_alignment
    if aligned is None or aligned.latent_E[tile] < 0:
        return ""
    return (
        f"<p>cosine of the signature with latent {int(aligned.latent_E[tile])}: {aligned.cosine_E[tile]:.2f}, "
        f"with permuted signs {aligned.null_cosine_E[tile]:.2f} (q {aligned.q_E[tile]:.3f})</p>"
    )


def _reading_record(report: TileReport, reading: TileReading) -> dict[str, Any]:
    causal, aligned = report.causal, report.top_alignment
    return {
        "tile": reading.tile,
        "share": reading.share,
        "tokens": [token._asdict() for token in reading.tokens],
        "passages": [passage._asdict() for passage in reading.passages],
        "latents": [_latent_record(latent) for latent in reading.latents],
        "plus": reading.plus,
        "minus": reading.minus,
        "causal": None
        if causal is None
        else {
            "latent": int(causal.latent_E[reading.tile]),
            "tokens": int(causal.tokens_E[reading.tile]),
            "changed": int(causal.changed_E[reading.tile]),
            "random_changed": float(causal.random_changed_E[reading.tile]),
        },
        "alignment": None
        if aligned is None
        else {
            "latent": int(aligned.latent_E[reading.tile]),
            "cosine": float(aligned.cosine_E[reading.tile]),
            "null_cosine": float(aligned.null_cosine_E[reading.tile]),
            "q": float(aligned.q_E[reading.tile]),
        },
    }


def _latent_record(latent: TileLatent) -> dict[str, Any]:
    return latent._asdict() | {"tokens": [token._asdict() for token in latent.tokens]}


def _causal_record(causal: CausalCheck) -> dict[str, Any]:
    tokens = int(causal.tokens_E.sum())
    return {"tokens": tokens, "changed": causal.changed, "random_changed": causal.random_changed, "ratio": causal.ratio}


def _alignment_record(alignment: Alignment | None) -> dict[str, Any] | None:
    if alignment is None:
        return None
    return {
        "aligned_tiles": alignment.num_aligned,
        "compared_tiles": alignment.num_compared,
        "cosine": alignment.cosine,
        "null_cosine": alignment.null_cosine,
    }


def _insertion_record(insertion: InsertionComparison | None, inserted: tuple[int, int] | None) -> dict[str, Any] | None:
    if insertion is None or inserted is None:
        return None
    edits = {"insertion": insertion.insertion._asdict(), "steering": insertion.steering._asdict()}
    return {"latent": inserted[0], "tile": inserted[1], **insertion._asdict(), **edits}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bits(value_K: np.ndarray) -> str:
    return f"mean {value_K.mean():.4f}, largest {value_K.max():.3f} bits"


def _percent(share: float) -> str:
    return "none" if math.isnan(share) else f"{share:.1%}"


def _times(ratio: float) -> str:
    return "no ratio" if not math.isfinite(ratio) else f"{ratio:.1f} times the control"


def _random_latents(causal: CausalCheck) -> str:
    return f"{_percent(causal.random_changed)} with random active latents of equal norm"


def _edit(edit: Edit) -> str:
    return f"KL {edit.kl:.4f}, {_percent(edit.kl_where_active)} of it where the latent is active, loss {edit.loss:.4f}"
