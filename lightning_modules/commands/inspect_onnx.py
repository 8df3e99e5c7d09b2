"""``trix inspect model.onnx``: one HTML page about an exported file, without torch. Legend: D model width, E tiles."""

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_modules.commands.onnx_ngrams import ngram_cell, ngrams_by_tile
from lightning_modules.errors import UserError
from ort_ops.file_format import LayerRecord, describe_size
from ort_ops.runtime import open_model
from ort_ops.signature_layers import SignatureLayer, operator_counts, read_model
from trix.introspection.page import definitions, heading, page, strip, surgery_table, table

INTRODUCTION = (
    "An exported TriX model: a feed-forward layer is cut into tiles, each token goes to the tiles whose signatures (-1, 0 or "
    "+1 per dimension) agree with it most. This page shows what the file says of itself."
)


def make_onnx_page(model: Path) -> str:
    """The page: task, size, parity, configuration, operators; surgery history; signatures, usage and bias by layer.

    Raises:
        UserError: it is no exported model.
    """
    try:
        proto, about, layers, records = read_model(model)
        session = open_model(model)
        parity = session.check_parity()
    except ValueError as error:
        raise UserError(str(error)) from error
    outside = session.external_data.file_bytes
    kernels = "native operators" if session.uses_library else "portable operators"
    activations, drift = _figures(asdict(about.activations)), _figures(about.drift)
    facts = {
        "file": str(model),
        "task": f"{about.task}".replace("_", " ") + ("" if about.module is None else f" ({about.module})"),
        "size": describe_size(session.file_bytes, session.float32_bytes),
        "external data": ", ".join(f"{name} {num_bytes / 1e6:.2f} MB" for name, num_bytes in outside.items()) or "none",
        "inputs": ", ".join(f"{value.name} {value.type} {value.shape}" for value in session.session.get_inputs()),
        "outputs": ", ".join(f"{value.name} {value.type} {value.shape}" for value in session.session.get_outputs()),
        "runs here": f"{parity} ({kernels})",
        "at export": _figures(about.export_parity),
        "activations": activations + (f"; against torch: {drift}" if drift else ""),
        "operators": ", ".join(f"{name} {count}" for name, count in operator_counts(proto).most_common()),
        "portable functions": ", ".join(function.name for function in proto.functions) or "none: needs the native operators",
        **({} if about.config is None else {"configuration": json.dumps(about.config)}),
    }
    entries = [(index, entry) for index, record in enumerate(records) for entry in record.history]
    usages = _usages((about.reference or {}).get("tile_idx"), layers)
    found = ngrams_by_tile(about, len(layers))
    ngrams: list[list[Counter[str]] | None] = [None] * len(layers) if found is None else [*found]
    parts = zip(layers, records, usages, ngrams, strict=True)
    sections = [_layer_section(index, *of_layer) for index, of_layer in enumerate(parts)]
    none = "" if layers else "<p>No layer of this file is routed by signatures.</p>"
    body = f"<p>{html.escape(INTRODUCTION)}</p>{definitions(facts.items())}{surgery_table(entries)}{none}{''.join(sections)}"
    return page(f"TriX model: {model.name}", body)


def _usages(tile_idx: Any, layers: Sequence[SignatureLayer]) -> list[NDArray[np.float64] | None]:
    """Share of the reference example's assignments by tile, [E] for each layer; None where the example has no tile_idx."""
    if not layers or tile_idx is None:
        return [None] * len(layers)
    idx = np.asarray(tile_idx, dtype=np.int64).reshape(-1, len(layers), layers[0].top_k)
    return [_usage(idx[:, place].ravel(), len(layer.signature_ED)) for place, layer in enumerate(layers)]


def _usage(tile_idx: NDArray[np.int64], num_tiles: int) -> NDArray[np.float64]:
    low, high = tile_idx.min(initial=0), tile_idx.max(initial=0)
    if low < 0 or high >= num_tiles:
        raise ValueError(f"tile_idx of the reference ({low if low < 0 else high}) must be >= 0 and < num_tiles ({num_tiles})")
    return np.bincount(tile_idx, minlength=num_tiles) / max(len(tile_idx), 1)


def _layer_section(
    index: int,
    layer: SignatureLayer,
    record: LayerRecord,
    usage_E: NDArray[np.float64] | None,
    ngrams: Sequence[Counter[str]] | None,
) -> str:
    num_tiles, width = layer.signature_ED.shape
    per_token = "1 tile" if layer.top_k == 1 else f"up to {layer.top_k} tiles"
    title = heading(
        2,
        f"Layer {index}",
        f"{record.kind}, {num_tiles} tiles, {width} dimensions, {per_token} per token, {record.source} signatures. "
        "Signature: one bar per dimension, orange +1, blue -1, light 0. Bias: what is added to the scores before the choice."
        + ("" if usage_E is None else " Usage: of the example in the file.")
        + ("" if ngrams is None else " N-grams: what of the example goes there, and its share of the example."),
        f"layer-{index}",
    )
    num_tokens = sum(map(Counter.total, ngrams or ())) // layer.top_k
    rows = []
    for tile, signature_D in enumerate(layer.signature_ED):
        states = {"frozen": tile in record.frozen, "free": bool(layer.is_free_E[tile])}
        badges = " ".join(f'<span class="badge">{name}</span>' for name, is_so in states.items() if is_so)
        counts = (f"{int((signature_D == value).sum())}" for value in (1, -1, 0))
        claims = () if record.claims is None else (_claims(record.claims[tile]),)
        bias = f"{layer.bias_E[tile]:+.3f}"
        usage = () if usage_E is None else (f"{usage_E[tile]:.1%}",)
        cell = () if ngrams is None else (ngram_cell(ngrams, tile, num_tokens),)
        rows.append((f"{tile} {badges}", strip(signature_D), *counts, *usage, bias, *claims, *cell))
    measured = () if usage_E is None else ("usage",)
    claimed = () if record.claims is None else ("claims",)
    named = () if ngrams is None else ("n-grams",)
    columns = ("tile", "signature", "plus", "minus", "zero", *measured, "bias", *claimed, *named)
    return title + f'<div class="signatures">{table(columns, rows)}</div>'


def _figures(values: Any) -> str:
    pairs = values.items() if isinstance(values, dict) else ()
    shown = ((name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else value) for name, value in pairs)
    return ", ".join(f"{name} {value}" for name, value in shown)


def _claims(count_C: Sequence[int]) -> str:
    top = sorted(range(len(count_C)), key=lambda c: -count_C[c])[:3]
    return ", ".join(f"class {c}: {count_C[c]}" for c in top if count_C[c]) or "-"
