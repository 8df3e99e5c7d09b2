"""One self-contained HTML page about a routed model: what each tile responds to, how much it is used, what lands there."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from trix.introspection import plots
from trix.introspection.capture import Capture
from trix.introspection.introspector import TriXIntrospector
from trix.introspection.ngrams import CountedText, NgramReader, count_ngrams, routes_on_context
from trix.introspection.page import definitions, drawing, heading, page, surgery_table, table
from trix.introspection.sample import Sample
from trix.introspection.tile_card import (
    HOW_TO_READ,
    HOW_TO_READ_NGRAMS,
    LayerReading,
    NgramReading,
    count_claims,
    is_counted,
    tile_card,
)
from trix.nn.ffn import TriXFFN
from trix.nn.routed_layer import RoutedLayer
from trix.outputs import RoutingDecision

StepT = TypeVar("StepT")

BATCH_SEQUENCES = 8
REDUNDANT_COSINE = 0.95
NOISE_LEVEL = 0.1
MAX_CLASSES_IN_FIGURE = 24

INTRODUCTION = (
    "In a TriX model a feed-forward layer is cut into tiles, small networks of their own. Each tile has a signature, a list of "
    "-1, 0 and +1 with one entry per dimension, and every token (a character, a row of an image) is computed only by the few "
    "tiles whose signatures agree with it most. So the routing can be read: this page shows what each tile responds to and "
    "what lands on it."
)
SUMMARY_COLUMNS = (
    ("layer", "routed layers, counted from 0 in the order of computation"),
    ("tiles", "how many the layer has, free slots among them"),
    ("unused", "tiles that no token of the sample went to; free slots are not counted"),
    ("frozen", "tiles whose signature training can no longer change"),
    ("diversity", "mean share of positions at which two signatures differ: 0 means all the same"),
    ("evenness", "entropy of the tiles' usage, as a share of its maximum: 1 if all get equally much, 0 if one gets all"),
    ("peak load", "usage of the busiest tile, in multiples of the equal share"),
    ("stability", f"share of tokens that keep their tile when their values get {NOISE_LEVEL:.0%} of random noise"),
    ("zero weights", "share of zeros among the tiles' ternary weights"),
    ("redundant", f"pairs of tiles with nearly the same signature (cosine of at least {REDUNDANT_COSINE}), without free slots"),
)


class Track(Protocol):
    """Hands on the steps of some work and shows how far it has come, as ``rich.progress.track`` does."""

    def __call__(self, steps: Sequence[StepT], description: str, /) -> Iterable[StepT]: ...


def untracked(steps: Sequence[StepT], description: str, /) -> Iterable[StepT]:  # noqa: ARG001
    return steps


@torch.no_grad()
def html_report(
    model: nn.Module,
    inputs: Tensor,
    tokens: Sequence[Sequence[str]] | None = None,
    title: str = "TriX report",
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    track: Track = untracked,
    counted: CountedText | None = None,
    remarks: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """The page, as text.

    Args:
        model: holds routed layers; run once on ``inputs``, in evaluation mode, and left as it was.
        inputs, tokens, labels, class_names: see :class:`~trix.introspection.sample.Sample`.
        facts: what else stands at the top, by name. track: shows the progress.
        counted: the text whose n-grams name the tiles and predict what they claim, for a model that routes on context; without
            it, the inputs themselves.
        remarks: HTML that is added to the cards of a layer, one text for each of its tiles, by the number of the layer among
            the routed ones.

    Raises:
        ValueError: the model has no routed layers, what is given does not fit the inputs, or remarks do not fit the layers.
    """
    sample = Sample(inputs, tokens, labels, class_names)
    introspector = TriXIntrospector(model)
    _check_remarks(remarks or {}, introspector.layers)
    capture = introspector.capture(track(torch.split(inputs, BATCH_SEQUENCES), "running the model"))
    layers = range(len(introspector.layers))
    reads_ngrams = routes_on_context(model) and inputs.dim() == 2 and not inputs.is_floating_point()
    own = _count_inputs(model, sample, is_counted(capture.decision[0])) if reads_ngrams else None
    texts = None if own is None else (counted or own, own)
    sections = [
        _layer_section(introspector, layer, capture, sample, texts, (remarks or {}).get(layer))
        for layer in track(layers, "drawing the layers")
    ]
    num_tokens = int(is_counted(capture.decision[0]).sum())
    at_most = "at most " if num_tokens < len(sample.label_N) else ""  # padding fills the others up
    measured = f"{num_tokens:,} tokens, in sequences of {at_most}{sample.length}"
    links = "".join(f'<a href="#layer-{layer}">Layer {layer}</a>' for layer in layers)
    body = (
        f"<p>{html.escape(INTRODUCTION)}</p>{definitions([*(facts or {}).items(), ('measured on', measured)])}"
        f"<nav>Go to {links}</nav>{_summary(introspector, capture)}{_surgery(introspector.layers)}"
        f"{_how_to_read(reads_ngrams)}{''.join(sections)}"
    )
    return page(title, body)


def _check_remarks(remarks: Mapping[int, Sequence[str]], layers: Sequence[RoutedLayer]) -> None:
    for index, remark_E in remarks.items():
        if not 0 <= index < len(layers):
            raise ValueError(f"layer of the remarks ({index}) must be >= 0 and < number of routed layers ({len(layers)})")
        if len(remark_E) != layers[index].num_tiles:
            raise ValueError(
                f"remarks of layer {index} ({len(remark_E)}) must be as many as its tiles ({layers[index].num_tiles})"
            )


def _summary(introspector: TriXIntrospector, capture: Capture) -> str:
    rows = []
    for index, layer in enumerate(introspector.layers):
        usage_E = introspector.routing_distribution(capture, index)
        evenness = introspector.routing_entropy(capture, index) / math.log(max(layer.num_tiles, 2))
        stability = introspector.routing_stability(capture, NOISE_LEVEL, index)
        has_matrices = isinstance(layer, TriXFFN) and layer.tiles.ternary_weights()
        zeros = f"{introspector.sparse_ratio(index):.0%}" if has_matrices else "-"
        rows.append(
            (
                f"{index}",
                f"{layer.num_tiles}",
                f"{int(((usage_E == 0) & ~introspector.free_slots(index)).sum())}",
                f"{int(layer.frozen_tiles().sum())}",
                f"{introspector.signature_diversity(index):.2f}",
                f"{evenness:.2f}",
                f"{float(usage_E.max() * layer.num_tiles):.1f}",
                "-" if math.isnan(stability) else f"{stability:.0%}",
                zeros,
                f"{len(introspector.redundant_tiles(REDUNDANT_COSINE, index))}",
            )
        )
    title = heading(2, "The layers at a glance", "One row per routed layer; what the columns mean stands below.")
    return title + table([name for name, _ in SUMMARY_COLUMNS], rows) + definitions(SUMMARY_COLUMNS)


def _surgery(layers: Sequence[RoutedLayer]) -> str:
    return surgery_table([(index, entry) for index, layer in enumerate(layers) for entry in layer.get_surgery_history()])


def _count_inputs(model: nn.Module, sample: Sample, is_counted_N: Tensor) -> CountedText:
    """The n-grams of the sample itself, of which each id is written as its first token is."""
    token_BT = sample.inputs.cpu()
    name_of: dict[int, str] = {}
    for ids, texts in zip(token_BT.tolist(), sample.tokens or token_BT.tolist(), strict=True):
        for token, text in zip(ids, texts, strict=True):
            name_of.setdefault(token, str(text))
    names = [name_of.get(token, "") for token in range(max(name_of) + 1)]
    mask_BT = is_counted_N.cpu().reshape(token_BT.shape)
    return CountedText(count_ngrams(token_BT, NgramReader(model).num_tokens, mask_BT), names, "the same tokens")


def _how_to_read(reads_ngrams: bool) -> str:
    title = heading(
        2, "How to read a tile's card", "Below the figures of a layer stands one card per tile. From top to bottom:"
    )
    return title + definitions((*HOW_TO_READ, *HOW_TO_READ_NGRAMS) if reads_ngrams else HOW_TO_READ)


def _layer_section(
    introspector: TriXIntrospector,
    index: int,
    capture: Capture,
    sample: Sample,
    texts: tuple[CountedText, CountedText] | None,
    remark_E: Sequence[str] | None,
) -> str:
    """texts: where n-grams decide, the one whose n-grams name the tiles, and the sample."""
    layer, decision = introspector.layers[index], capture.decision[index]
    reading = LayerReading(
        layer,
        decision,
        introspector.tile_signatures(index),
        introspector.signature_similarity_matrix(index),
        introspector.routing_distribution(capture, index),
        count_claims(decision, layer.num_tiles, sample),
        None if texts is None else _read_ngrams(introspector.model, index, *texts),
        remark_E,
    )
    cards = "".join(tile_card(reading, tile, sample) for tile in range(layer.num_tiles))
    return (
        heading(2, f"Layer {index}", _routing_line(reading), anchor=f"layer-{index}")
        + _layer_figures(reading, sample)
        + heading(3, f"The tiles of layer {index}", "One card per tile; how to read it stands at the top of the page.")
        + f'<div class="tiles">{cards}</div>'
    )


def _read_ngrams(model: nn.Module, index: int, counted: CountedText, own: CountedText) -> NgramReading:
    reader = NgramReader(model)
    return NgramReading(counted, reader.claims(counted.ngrams, index), reader.claims(own.ngrams, index))


def _layer_figures(reading: LayerReading, sample: Sample) -> str:
    kind, rate_EC = sample.class_kind, reading.claims.compute()
    tokens = "each token goes" if kind == "token" else "the tokens of each class go"
    frequent = reading.claims.count_EC.sum(dim=0).argsort(descending=True, stable=True)[:MAX_CLASSES_IN_FIGURE].sort().values
    names = [sample.class_names[c] for c in frequent.tolist()]
    rarer = f" The {len(names)} most frequent are shown." if len(names) < len(sample.class_names) else ""
    is_shown_T = is_counted(reading.decision)[: sample.length]
    first = RoutingDecision(*(part[: sample.length][is_shown_T] for part in reading.decision))
    first_tokens = [token for token, is_shown in zip(sample.first_tokens(), is_shown_T.tolist(), strict=True) if is_shown]
    figures = (
        (
            "Signatures",
            "Each row is a tile, each column a dimension of the tokens: orange where the tile wants a large value, blue where "
            "it wants a small (negative) one, light where it does not care.",
            plots.signature_heatmap(reading.signature_ED, ""),
        ),
        (
            "Usage",
            "How much of the traffic each tile gets. The line is the share that each would get if all got equally much.",
            plots.usage_bars(reading.usage_E, ""),
        ),
        (
            f"{kind.capitalize()} by tile",
            f"Where {tokens}: a row adds up to 100 %, and a dark cell is a tile that claims the {kind}." + rarer,
            plots.claim_heatmap(rate_EC[:, frequent], names, "", kind),
        ),
        (
            "Similarity of signatures",
            "Which tiles respond to the same things: red for the same signature, white for unrelated ones, blue for opposites.",
            plots.similarity_heatmap(reading.similarity_EE, ""),
        ),
        (
            "Routing of the first tokens",
            "How much each tile agrees with each token of the first sequence (darker is more); a dot marks each chosen tile. A "
            "balance term, which training keeps to spread the load, can choose another tile than the darkest.",
            plots.routing_heatmap(first.score.softmax(-1), first.tile_idx, "", first_tokens),
        ),
    )
    return "".join(heading(3, name, explanation) + drawing(figure, name) for name, explanation, figure in figures)


def _routing_line(reading: LayerReading) -> str:
    layer, router = reading.layer, reading.layer.router
    top_k = reading.decision.tile_idx.shape[1]
    per_token = "1 tile" if top_k == 1 else f"up to {top_k} tiles" if router.is_adaptive else f"{top_k} tiles"
    line = f"{layer.num_tiles} tiles, {layer.d_model} dimensions, {per_token} per token. {router.describe()}"
    if reading.ngrams is None:
        return line
    found, usage_E = reading.ngrams, reading.usage_E.cpu()
    of_text, of_sample = (
        f"{100 * float((claims.rates() - usage_E).abs().max()):.1f}" for claims in (found.claims, found.claims_of_sample)
    )
    return (
        f"{line} It reads {found.claims.ngrams.id_NJ.shape[1]} tokens at a time. The usage predicted from the n-grams of "
        f"{found.claims.num_tokens:,} tokens ({found.counted.source}) is at most {of_text} points off, from those of the "
        f"sample itself {of_sample}."
    )
