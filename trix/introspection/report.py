"""One self-contained HTML page about a routed model: what each tile responds to, how much it is used, what lands there."""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from trix.introspection import plots
from trix.introspection.introspector import TriXIntrospector
from trix.outputs import RoutingDecision
from trix.routing.router import SignatureRouter

CONTEXTS_PER_TILE = 4
CONTEXT_RADIUS = 18
TOKENS_PER_TILE = 8

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a202c; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.15 } h2 { border-top: 2px solid #e2e8f0; padding-top: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left } img { max-width: 100% }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
.tile { border: 1px solid #cbd5e0; border-radius: 6px; padding: .7rem .9rem; overflow: hidden }
.tile h3 { margin: 0 0 .3rem } .strip { width: 100%; height: 14px; image-rendering: pixelated; display: block }
.muted { color: #718096 } .bar { background: #e2e8f0; height: 6px } .bar div { background: #4a5568; height: 6px }
code, .context { font-family: ui-monospace, monospace; font-size: 13px } .context { white-space: pre; overflow: hidden }
mark { background: #fbd38d } .badge { background: #2b6cb0; color: white; border-radius: 4px; padding: 0 .4rem; font-size: 12px }
"""


@torch.no_grad()
def html_report(model: nn.Module, inputs: Tensor, tokens: Sequence[Sequence[str]], title: str = "TriX report") -> str:
    """The page, as text.

    Args:
        model: holds routed layers; run once per layer on ``inputs``, in evaluation mode, and left as it was.
        inputs: [B, T] or [B, T, F], what the model takes. tokens: B sequences of T strings, how each token is shown.

    Raises:
        ValueError: the model has no routed layers, or tokens do not fit the inputs.
    """
    lengths = {len(sequence) for sequence in tokens}
    if len(tokens) != inputs.shape[0] or lengths != {inputs.shape[1]}:
        raise ValueError(f"tokens ({len(tokens)} of lengths {sorted(lengths)}) must fit inputs {tuple(inputs.shape[:2])}")
    introspector = TriXIntrospector(model)
    flat = [token for sequence in tokens for token in sequence]
    sections = [_layer_section(introspector, layer, inputs, tokens, flat) for layer in range(len(introspector.layers))]
    body = f"<h1>{html.escape(title)}</h1>{_summary(introspector, inputs)}{''.join(sections)}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _summary(introspector: TriXIntrospector, inputs: Tensor) -> str:
    rows = []
    for layer, ffn in enumerate(introspector.layers):
        usage = introspector.routing_distribution(inputs, layer)
        entropy = introspector.routing_entropy(inputs, layer) / max(torch.tensor(float(len(usage))).log().item(), 1e-9)
        values = (
            f"{ffn.num_tiles}",
            f"{introspector.signature_diversity(layer):.3f}",
            f"{entropy:.3f}",
            f"{float(usage.max() * len(usage)):.2f}",
            f"{introspector.routing_stability(inputs, 0.1, layer):.3f}",
            f"{introspector.sparse_ratio(layer):.3f}",
            f"{len(introspector.redundant_tiles(0.95, layer))}",
        )
        rows.append(f"<tr><td>{layer}</td>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>")
    names = (
        "layer",
        "tiles",
        "diversity",
        "entropy / max",
        "max / mean load",
        "stable at 10 % noise",
        "zero weights",
        "redundant pairs",
    )
    header = "".join(f"<th>{name}</th>" for name in names)
    count = inputs.shape[0] * inputs.shape[1]
    return f"<p>Measured on {count:,} tokens.</p><table><tr>{header}</tr>{''.join(rows)}</table>"


def _layer_section(
    introspector: TriXIntrospector, layer: int, inputs: Tensor, tokens: Sequence[Sequence[str]], flat: list[str]
) -> str:
    decision = introspector.decision(inputs, layer)
    usage = introspector.routing_distribution(inputs, layer)
    similarity = introspector.signature_similarity_matrix(layer)
    length = len(tokens[0])
    first = RoutingDecision(*(part[:length] for part in decision))
    figures = [
        introspector.plot_signatures(layer),
        plots.usage_bars(usage, "Usage"),
        plots.similarity_heatmap(similarity, "Similarity of signatures"),
        plots.routing_heatmap(first.score.softmax(-1), first.tile_idx, "Routing of the first tokens", list(tokens[0])),
    ]
    images = "".join(f'<p><img alt="" src="{_data_uri(figure)}"></p>' for figure in figures)
    ffn, signatures = introspector.layers[layer], introspector.tile_signatures(layer)
    cards = []
    for tile, signature in enumerate(signatures):
        is_frozen = isinstance(ffn.router, SignatureRouter) and ffn.is_frozen(tile)
        frozen = ' <span class="badge">frozen</span>' if is_frozen else ""
        heading = f"<h3>Tile {tile}{frozen}</h3>{_strip(signature)}"
        counts = f'<div class="muted">{_counts(signature)}{_nearest(similarity, tile)}</div>'
        card = heading + counts + _traffic(tile, decision, float(usage[tile]), tokens, flat)
        cards.append(f'<div class="tile">{card}</div>')
    return f'<h2>Layer {layer}</h2>{images}<div class="tiles">{"".join(cards)}</div>'


def _traffic(tile: int, decision: RoutingDecision, usage: float, tokens: Sequence[Sequence[str]], flat: list[str]) -> str:
    """How much comes to the tile, which tokens, and the strongest of them in their contexts."""
    landed = (decision.tile_idx == tile).any(dim=-1).nonzero().flatten()
    strongest = landed[decision.score[landed, tile].argsort(descending=True)]
    common = Counter(flat[index] for index in landed.tolist()).most_common(TOKENS_PER_TILE)
    shown = " ".join(
        f"<code>{html.escape(_visible(token))}</code>&nbsp;{count / max(len(landed), 1):.0%}" for token, count in common
    )
    contexts = "".join(_context(tokens, index) for index in strongest[:CONTEXTS_PER_TILE].tolist())
    return (
        f'<div>usage {usage:.1%}</div><div class="bar"><div style="width:{min(usage, 1):.1%}"></div></div>'
        f"<p>{shown or 'no token landed here'}</p>{contexts}"
    )


def _counts(signature: Tensor) -> str:
    return ", ".join(f"{int((signature == value).sum())} {name}" for value, name in ((1, "plus"), (-1, "minus"), (0, "zero")))


def _nearest(similarity_EE: Tensor, tile: int) -> str:
    similarity = similarity_EE[tile].clone()
    if len(similarity) < 2:
        return ""
    similarity[tile] = -2.0
    nearest = int(similarity.argmax())
    return f"; nearest: tile {nearest} (cosine {float(similarity[nearest]):.2f})"


def _context(tokens: Sequence[Sequence[str]], index: int) -> str:
    sequence, place = tokens[index // len(tokens[0])], index % len(tokens[0])
    before = "".join(_visible(token) for token in sequence[max(place - CONTEXT_RADIUS, 0) : place])
    after = "".join(_visible(token) for token in sequence[place + 1 : place + 1 + CONTEXT_RADIUS // 2])
    marked = html.escape(_visible(sequence[place]))
    return f'<div class="context">{html.escape(before):>{CONTEXT_RADIUS}}<mark>{marked}</mark>{html.escape(after)}</div>'


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥")


def _strip(signature: Tensor) -> str:
    """The signature as one row of coloured pixels."""
    cells = "".join(
        f'<rect x="{d}" width="1.02" height="1" fill="{plots.SIGNATURE_COLOURS[int(v)]}"/>'
        for d, v in enumerate(signature.tolist())
    )
    return f'<svg class="strip" viewBox="0 0 {len(signature)} 1" preserveAspectRatio="none">{cells}</svg>'


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
