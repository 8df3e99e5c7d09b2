"""Drawings as files. Loads no torch, and matplotlib only where there is something to write."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_svg(figure: "Figure") -> bytes:
    """The figure as an SVG file, without the date: the same figure gives the same header."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
