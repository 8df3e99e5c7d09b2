"""The parts that a report page is put together from: its style, tables, figures, pictures. All of them are HTML texts.

Importing it loads no torch, so that a page about an exported file needs none.
"""

import base64
import html
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trix.introspection.symbols import SIGNATURE_COLOURS, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MAX_SURGERY_ROWS = 200

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a202c; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.15 } h2 { border-top: 2px solid #e2e8f0; padding-top: 1.2rem; margin-top: 2.2rem }
h3 { margin: 1.4rem 0 .2rem } p { margin: .3rem 0 .6rem } nav a { margin: 0 .4rem }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } .scroll { overflow-x: auto } img { max-width: 100% }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { font-weight: 600 } dd { margin: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
.tile { border: 1px solid #cbd5e0; border-radius: 6px; padding: .7rem .9rem; overflow: hidden }
.tile h4 { margin: 0 0 .3rem; font-size: 1.1rem } .tile table { margin: .4rem 0; font-size: 14px } .tile p { margin: .3rem 0 }
.signatures table { width: 100% } .signatures td:nth-child(2) { width: 50% }
.strip { width: 100%; height: 14px; display: block; background: #eeeeee; margin-bottom: 3px }
.muted { color: #5f6b7a } .bar { background: #e2e8f0; height: 6px } .bar div { background: #4a5568; height: 6px }
code, .context { font-family: ui-monospace, monospace; font-size: 13px }
.context { white-space: pre; overflow: hidden; text-overflow: ellipsis }
.passage { white-space: pre-wrap; overflow-wrap: anywhere }
.pictures { display: flex; gap: .6rem; flex-wrap: wrap } figure { margin: 0; font-size: 13px }
.picture { height: 60px; display: block } mark { background: #fbd38d }
.badge { background: #2b6cb0; color: white; border-radius: 4px; padding: 0 .4rem; font-size: 12px }
"""


def page(title: str, body: str, head: str = "") -> str:
    """body, head: HTML; head comes after the style that all pages share."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{html.escape(title)}</title><style>{STYLE}</style>{head}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n'


def heading(level: int, text: str, explanation: str, anchor: str = "") -> str:
    """A heading with the line that says what stands below it."""
    name = f' id="{anchor}"' if anchor else ""
    return f'<h{level}{name}>{html.escape(text)}</h{level}><p class="muted">{html.escape(explanation)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """header and cells: HTML."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def surgery_table(entries: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """The section on what was done by hand. entries: each with the index of its layer, as they stand in the histories."""
    title = heading(
        2,
        "Surgery history",
        "Every change made to a layer's tiles by hand or by a schedule rather than by learning: signatures inserted, frozen, "
        "unfrozen; tiles removed, drawn anew (reseed), merged with another (dropped), split into two (the other is the "
        "target); one more tile per token (raise_k). Step: how many training batches the layer had seen. File onnx: done to an "
        "exported file.",
    )
    if not entries:
        return title + "<p>None: all signatures are as training made them.</p>"
    entries = sorted(entries, key=lambda pair: (pair[1].get("step", 0), pair[0]))
    shown = entries[-MAX_SURGERY_ROWS:]
    left_out = f"<p>The last {len(shown)} of {len(entries)}.</p>" if len(shown) < len(entries) else ""
    rows = [
        tuple(
            html.escape(str(value))
            for value in (entry["step"], index, _tile(entry), entry["operation"], _details(entry), entry["tag"])
        )
        for index, entry in shown
    ]
    return title + left_out + table(("step", "layer", "tile", "action", "details", "tag"), rows)


def _tile(entry: Mapping[str, Any]) -> str:
    return "-" if entry["tile_idx"] < 0 else str(entry["tile_idx"])  # -1: the whole layer


def _details(entry: Mapping[str, Any]) -> str:
    """What else an operation says of itself, but for lists, as those of the dimensions of an inserted signature."""
    further = {name: value for name, value in entry.items() if name not in ("step", "tile_idx", "operation", "tag")}
    return ", ".join(f"{name} {value}" for name, value in further.items() if not isinstance(value, list))


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>' for name, text in pairs)}</dl>"


def code(text: str) -> str:
    """A token as it is written, its spaces visible."""
    return f"<code>{html.escape(visible(text))}</code>"


def drawing(figure: "Figure", description: str) -> str:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=110)
    return f'<p><img alt="{html.escape(description)}" src="{_data_uri(buffer)}"></p>'


def strip(signature_D: NDArray[Any]) -> str:
    """A signature as one row of pixels: blue -1, light 0, orange +1."""
    width, bars = len(signature_D), []
    for value in (-1, 1):
        places = np.flatnonzero(signature_D == value).tolist()
        path = "".join(f"M{place} .5h1" for place in places)
        bars.append(f'<path d="{path}" stroke="{SIGNATURE_COLOURS[value]}" stroke-width="1"/>')
    return f'<svg class="strip" viewBox="0 0 {width} 1" preserveAspectRatio="none">{"".join(bars)}</svg>'


def picture(value_TF: "Tensor", row: int, caption: str) -> str:
    """The rows of a sequence as grey values, darkest where they are largest, one row framed."""
    from matplotlib.image import imsave

    length, width = value_TF.shape
    buffer = io.BytesIO()
    imsave(buffer, value_TF.float().cpu().numpy(), cmap="Greys", format="png")
    image = (
        f'<image href="{_data_uri(buffer)}" width="{width}" height="{length}" preserveAspectRatio="none"'
        ' style="image-rendering:pixelated"/>'
    )
    frame = f'<rect x="0" y="{row}" width="{width}" height="1" fill="none" stroke="#c05621" stroke-width=".25"/>'
    view = f'viewBox="-.2 -.2 {width + 0.4} {length + 0.4}"'
    return f'<figure><svg class="picture" {view}>{image}{frame}</svg>{html.escape(caption)}</figure>'


def _data_uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
