"""Fisher's exact tests of latents against classes of documents, and a loop over scipy: time, agreement, false discoveries.

2048 latents, 8 classes, 4000 documents of 20 tokens. A latent has 60 to 200 top tokens, which come in bursts within documents;
every second latent takes six tenths of its documents from one class, the others take any. Contestants, one-sided and two-sided:
ours, and scipy.stats.fisher_exact for each of the 16384 tables; both get the counts, and adjust their p-values by Benjamini and
Hochberg. "from the top tokens" is all that class_enrichment does, which also counts documents. All take turns; a ratio is the
median over the turns of the CPU time over ours.

Discoveries (q <= .05) are counted with the real labels, and with labels that were shuffled between documents, where all are
false; as a control also with shuffled labels where tokens are counted in place of documents.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from case_options import whole
from scipy.stats import false_discovery_control, fisher_exact
from turns import interleaved

from trix.superposition.analysis import class_enrichment
from trix.superposition.analysis.fisher import Alternative, fisher_exact_many

LATENTS, CLASSES, DOCUMENTS, TOKENS = 2048, 8, 4000, 20
BURST = 5  # top tokens of a latent in each of its documents
FALSE_DISCOVERY_RATE = 0.05
SIDES: dict[str, Alternative] = {"one-sided": "greater", "two-sided": "two-sided"}
GOALS = {"one-sided": 250, "two-sided": 500}
OURS, LOOP, WHOLE = "ours", "scipy loop", "from the top tokens"

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=whole(1), default=5, help="turns (default: %(default)s)")
    parser.add_argument("--shuffles", type=whole(1), default=20, help="times the labels are shuffled (default: %(default)s)")


def run(repeats: int, shuffles: int) -> dict[str, Any]:
    label_P, tokens = planted()
    document_N = np.repeat(np.arange(DOCUMENTS), TOKENS)
    found = class_enrichment(tokens, label_P[document_N], document_N)
    results: dict[str, Any] = {"seconds": {}, "ratios": {}, "largest_difference": {}}
    for side, alternative in SIDES.items():
        adjusted: dict[str, tuple[Floats, Floats]] = {}
        ways = contestants(found.hits_KC, found.num_documents_K, np.bincount(label_P), alternative, adjusted)
        ways[WHOLE] = lambda alternative=alternative: class_enrichment(tokens, label_P[document_N], document_N, alternative)
        interleaved({name: way for name, way in ways.items() if name != LOOP}, 1)
        seconds = interleaved(ways, repeats)
        results["seconds"][side] = seconds
        results["ratios"][side] = [loop / ours for loop, ours in zip(seconds[LOOP], seconds[OURS], strict=True)]
        results["largest_difference"][side] = max(
            float(np.max(np.abs(ours - theirs) / theirs)) for ours, theirs in zip(adjusted[OURS], adjusted[LOOP], strict=True)
        )
    results["tests"] = found.p_KC.size
    results["discoveries"] = int((found.q_KC <= FALSE_DISCOVERY_RATE).sum())
    results["shuffled"] = [false_discoveries(tokens, label_P, document_N, seed, True) for seed in range(shuffles)]
    results["shuffled_by_token"] = [false_discoveries(tokens, label_P, document_N, seed, False) for seed in range(shuffles)]
    return results


def planted() -> tuple[Ints, list[Ints]]:
    """The class of each document, and the top tokens of each latent."""
    draw = np.random.default_rng(0)
    label_P = draw.integers(0, CLASSES, DOCUMENTS)
    of_class = [np.flatnonzero(label_P == label) for label in range(CLASSES)]
    tokens = []
    for latent in range(LATENTS):
        size = int(draw.integers(12, 41))
        documents = draw.choice(DOCUMENTS, size, replace=False)
        if latent % 2 == 0:
            own = draw.choice(of_class[latent // 2 % CLASSES], size * 6 // 10, replace=False)
            documents = np.unique(np.concatenate([own, documents[: size - len(own)]]))
        places = draw.integers(0, TOKENS - BURST + 1, len(documents))
        tokens.append((documents * TOKENS + places)[:, None] + np.arange(BURST))
    return label_P, [found.ravel() for found in tokens]


def contestants(
    hits_KC: Ints, drawn_K: Ints, marked_C: Ints, alternative: Alternative, adjusted: dict[str, tuple[Floats, Floats]]
) -> dict[str, Callable[[], Any]]:
    """Ours, and the loop; each leaves its p-values and the adjusted ones in ``adjusted``."""

    def ours() -> None:
        p_KC = fisher_exact_many(hits_KC, drawn_K[:, None], marked_C, DOCUMENTS, alternative)
        adjusted[OURS] = p_KC, false_discovery_control(p_KC, axis=None).reshape(p_KC.shape)

    def loop() -> None:
        p_KC = np.empty(hits_KC.shape)
        for (latent, label), hits in np.ndenumerate(hits_KC):
            drawn, marked = drawn_K[latent], marked_C[label]
            table = [[hits, drawn - hits], [marked - hits, DOCUMENTS - drawn - marked + hits]]
            p_KC[latent, label] = fisher_exact(table, alternative=alternative).pvalue
        adjusted[LOOP] = p_KC, false_discovery_control(p_KC, axis=None).reshape(p_KC.shape)

    return {OURS: ours, LOOP: loop}


def false_discoveries(tokens: list[Ints], label_P: Ints, document_N: Ints, seed: int, by_document: bool) -> int:
    """Discoveries among labels that were shuffled between documents."""
    shuffled_P = np.random.default_rng(seed).permutation(label_P)
    found = class_enrichment(tokens, shuffled_P[document_N], document_N if by_document else None)
    return int((found.q_KC <= FALSE_DISCOVERY_RATE).sum())


def table(results: dict[str, Any]) -> str:
    lines = ["| tests | way | CPU ms | x ours | goal |", "|---|---|---|---|---|"]
    for side, seconds in results["seconds"].items():
        for name, turns in seconds.items():
            ratio = statistics.median(turn / ours for turn, ours in zip(turns, seconds[OURS], strict=True))
            goal = f">= {GOALS[side]}" if name == LOOP else ""
            lines.append(f"| {side} | {name} | {1000 * statistics.median(turns):.1f} | {ratio:.1f} | {goal} |")
    worst = max(results["largest_difference"].values())
    lines.append(f"\nlargest relative difference of a p-value, adjusted or not: {worst:.1e} (goal: <= 1e-9)")
    lines.append(f"discoveries among {results['tests']} tests: {results['discoveries']}")
    for key, what in (("shuffled", "of documents"), ("shuffled_by_token", "of documents, tokens counted")):
        counts = results[key]
        lines.append(f"discoveries with shuffled labels {what}: {statistics.mean(counts):.1f} (up to {max(counts)})")
    return "\n".join(lines)
