"""The n-grams that the tiles of an exported model answer to, as its own example shows them. Needs numpy alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ort_ops.file_format import CLASSIFIER, FileRecord
from trix.introspection.page import code
from trix.introspection.symbols import BEGINNING

MAX_TOKENS = 64  # of an n-gram
SHOWN = 6


def ngrams_by_tile(about: FileRecord, num_layers: int) -> list[list[Counter[str]]] | None:
    """By layer and tile, how often each n-gram of the file's example goes there; None where the model reads none.

    Raises:
        ValueError: the example holds ids that the vocabulary lacks, or does not fit its tiles.
    """
    ffn = (about.config or {}).get("ffn")
    reference = about.reference or {}
    is_read = isinstance(ffn, dict) and ffn.get("route_on") == "context" and about.vocabulary is not None
    if not is_read or not isinstance(ffn, dict) or num_layers == 0 or reference.get("tile_idx") is None:
        return None
    num_tokens = ffn.get("context_tokens")
    if type(num_tokens) is not int or not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"metadata config.ffn.context_tokens ({num_tokens!r:.40}) must be >= 1 and <= {MAX_TOKENS}")
    token_BT = np.asarray(reference["input"], dtype=np.int64)
    if token_BT.ndim != 2:
        raise ValueError(f"input of the reference ({token_BT.ndim} axes) must have 2")
    names = list(about.vocabulary or "")
    low, high = token_BT.min(initial=0), token_BT.max(initial=0)
    if low < 0 or high >= len(names):
        raise ValueError(f"input of the reference ({low if low < 0 else high}) must be >= 0 and < vocabulary ({len(names)})")
    tile_idx = np.asarray(reference["tile_idx"], dtype=np.int64).reshape(*token_BT.shape, num_layers, -1)
    padding = 0 if about.task == CLASSIFIER else -1
    counts: list[dict[int, Counter[str]]] = [{} for _ in range(num_layers)]
    for token_T, tile_TLK in zip(token_BT.tolist(), tile_idx.tolist(), strict=True):
        for place, tile_LK in enumerate(tile_TLK):
            if token_T[place] != padding:
                ngram = _written(token_T[max(place - num_tokens + 1, 0) : place + 1], names, num_tokens, padding)
                for of_layer, tile_K in zip(counts, tile_LK, strict=True):
                    for tile in tile_K:
                        of_layer.setdefault(tile, Counter())[ngram] += 1
    return [[of_layer.get(tile, Counter()) for tile in range(max(of_layer, default=-1) + 1)] for of_layer in counts]


def _written(ids: Sequence[int], names: Sequence[str], num_tokens: int, padding: int) -> str:
    known = [BEGINNING if token == padding else names[token] for token in ids]
    return BEGINNING * (num_tokens - len(known)) + "".join(known)


def ngram_cell(by_tile: Sequence[Counter[str]], tile: int, num_tokens: int) -> str:
    """HTML: the n-grams of a tile with their share of the example, the largest first."""
    found: Any = by_tile[tile].most_common() if tile < len(by_tile) else []
    shown = " ".join(f"{code(ngram)}&nbsp;{count / max(num_tokens, 1):.1%}" for ngram, count in found[:SHOWN])
    return (shown or "-") + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
