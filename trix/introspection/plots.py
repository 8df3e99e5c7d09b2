"""Figures of signatures and routing. matplotlib figures without pyplot, so that nothing global changes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from trix.introspection.symbols import SIGNATURE_COLOURS, visible

MAX_CELLS_WITH_TEXT = 400


def draw_signatures(axes: Axes, signatures_ED: Tensor) -> AxesImage:
    """Tiles by dimensions of values in {-1, 0, +1}, in SIGNATURE_COLOURS."""
    return axes.imshow(
        signatures_ED.detach().float().cpu().numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(list(SIGNATURE_COLOURS.values())),
        norm=BoundaryNorm([-1.5, -0.5, 0.5, 1.5], len(SIGNATURE_COLOURS)),
    )


def draw_claims(axes: Axes, rate_EC: Tensor, class_names: Sequence[str], kind: str = "class") -> AxesImage:
    """Classes by tiles: the share of a class's tokens that went to a tile, written out where there is room.

    kind: what the classes are called.
    """
    rate_CE = rate_EC.T.float().cpu().numpy()
    image = axes.imshow(rate_CE, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_ylabel(kind)
    axes.set_yticks(range(len(class_names)), class_names)
    num_tiles = rate_CE.shape[1]
    axes.set_xticks(range(0, num_tiles, max(num_tiles // 32, 1)))
    if rate_CE.size <= MAX_CELLS_WITH_TEXT:
        for row, column in zip(*(rate_CE >= 0.05).nonzero(), strict=True):
            share = rate_CE[row, column]
            colour = "white" if share > 0.6 else "black"
            text = axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
            text.set_in_layout(False)  # it is inside the axes; to measure all takes a sixth of the time
    return image


def draw_similarity(axes: Axes, similarity_EE: Tensor) -> AxesImage:
    """Tiles by tiles: the cosine of their signatures, from -1 to 1."""
    return axes.imshow(similarity_EE.float().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def draw_routing(axes: Axes, probability_TE: Tensor, tile_idx_TK: Tensor, is_used_TK: Tensor | None = None) -> AxesImage:
    """Tiles by tokens: the softmax of the scores in grey, a dot on each chosen tile; those that is_used_TK denies have none."""
    image = axes.imshow(probability_TE.float().cpu().numpy().T, aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
    tile_idx = tile_idx_TK.cpu().numpy()
    is_used = np.ones_like(tile_idx, dtype=bool) if is_used_TK is None else is_used_TK.cpu().numpy()
    axes.scatter(is_used.nonzero()[0], tile_idx[is_used], s=14, color="#c05621")
    return image


def claim_heatmap(rate_EC: Tensor, class_names: Sequence[str], title: str, kind: str = "class") -> Figure:
    """One layer's claim rates, see :func:`draw_claims`."""
    num_tiles, num_classes = rate_EC.shape
    figure = Figure(figsize=(max(6.0, 2.0 + 0.42 * min(num_tiles, 20)), 1.2 + 0.28 * num_classes), layout="constrained")
    axes = figure.add_subplot()
    image = draw_claims(axes, rate_EC, [printable(name) for name in class_names], kind)
    figure.colorbar(image, ax=axes, label=f"share of the {kind}", fraction=0.05)
    axes.set(title=title, xlabel="tile")
    return figure


def signature_heatmap(signatures_ED: Tensor, title: str) -> Figure:
    """Tiles by dimensions; -1 blue, 0 light, +1 orange."""
    num_tiles, width = signatures_ED.shape
    figure = Figure(figsize=(10, 1.2 + 0.22 * min(num_tiles, 40)), layout="constrained")
    axes = figure.add_subplot()
    image = draw_signatures(axes, signatures_ED)
    figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], fraction=0.02)
    axes.set(title=title, xlabel="dimension", ylabel="tile")
    axes.set_yticks(range(num_tiles) if num_tiles <= 32 else range(0, num_tiles, num_tiles // 16))
    axes.set_xlim(-0.5, width - 0.5)
    return figure


def similarity_heatmap(similarity_EE: Tensor, title: str) -> Figure:
    """Cosine of pairs of signatures, from -1 to 1."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = draw_similarity(axes, similarity_EE)
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set(title=title, xlabel="tile", ylabel="tile")
    return figure


def routing_heatmap(
    probability_TE: Tensor, tile_idx_TK: Tensor, title: str, labels: list[str] | None = None, max_tokens: int = 64
) -> Figure:
    """The first max_tokens tokens by tiles; a dot marks each chosen tile.

    Raises:
        ValueError: labels are not one per token.
    """
    if labels is not None and len(labels) != probability_TE.shape[0]:
        raise ValueError(f"number of labels ({len(labels)}) must equal the number of tokens ({probability_TE.shape[0]})")
    shown = min(max_tokens, probability_TE.shape[0])
    figure = Figure(figsize=(max(4.0, 1.5 + 0.16 * shown), 1.2 + 0.2 * min(probability_TE.shape[1], 40)), layout="constrained")
    axes = figure.add_subplot()
    image = draw_routing(axes, probability_TE[:shown], tile_idx_TK[:shown])
    figure.colorbar(image, ax=axes, label="softmax of scores", fraction=0.02)
    axes.set(title=title, ylabel="tile", xlabel="token")
    if labels is not None:
        axes.set_xticks(range(shown), [printable(label) for label in labels[:shown]], fontfamily="monospace")
    return figure


def usage_bars(usage_E: Tensor, title: str) -> Figure:
    """Share of the assignments by tile, with the equal share as a line."""
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(usage_E)), usage_E.float().cpu().numpy(), color="#4a5568")
    axes.axhline(1 / len(usage_E), color="#c05621", linewidth=1, label="equal share")
    axes.set(title=title, xlabel="tile", ylabel="share of tokens")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, loc="upper left")
    return figure


def printable(text: str) -> str:
    """The text with white space and control characters made visible, in words that matplotlib does not take for mathematics."""
    return visible(text).replace("$", r"\$")
