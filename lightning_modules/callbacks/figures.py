"""Figures for TensorBoard: drawn on figures of their own, so pyplot's global state is never touched.

Shape suffixes: E tiles, D model width, C classes, T tokens, K chosen tiles.
"""

import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from trix.functional.signatures import pairwise_cosine
from trix.introspection.plots import (
    draw_claims,
    draw_routing,
    draw_signatures,
    draw_similarity,
    printable,
)
from trix.introspection.symbols import SIGNATURE_COLOURS
from trix.outputs import RoutingInfo
from trix.whole_file import write_whole

MAX_CLASSES_BY_LABEL = 32
PAGE_WIDTH = 6.0  # inches; TensorBoard shows figures in columns of about 350 pixels


def add_figure(trainer: L.Trainer, tag: str, figure: Figure) -> None:
    """Write the figure to each TensorBoard logger, at the present step; other loggers get nothing."""
    for logger in tensorboard_loggers(trainer):
        if trainer.is_global_zero:
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step, close=False)


def save_figure(trainer: L.Trainer, name: str, figure: Figure) -> None:
    """Write the figure as a PNG file into the folder of each TensorBoard logger."""
    if not trainer.is_global_zero:
        return
    content = io.BytesIO()
    figure.savefig(content, format="png")
    for logger in tensorboard_loggers(trainer):
        write_whole(content.getvalue(), Path(logger.log_dir) / name)


def tensorboard_loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def has_tensorboard(trainer: L.Trainer) -> bool:
    return bool(tensorboard_loggers(trainer))


class DrawingBudget:
    """Says when to draw figures in a run, so that they take at most a share of its time, whatever a figure costs.

    Time is that of this thread on the CPU: what others do on the machine makes figures neither fewer nor more.

    Args:
        share: fraction of the time, in (0, 1]. first_cost_s: what the first drawing is expected to take, in seconds.
    """

    def __init__(self, share: float = 0.01, first_cost_s: float = 0.5) -> None:
        self.share, self._cost_s, self._last = share, first_cost_s, time.thread_time()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last drawing, or since this object was made."""
        return self._cost_s <= self.share * (time.thread_time() - self._last)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw inside it: takes the time."""
        start = time.thread_time()
        yield
        self._last = time.thread_time()
        self._cost_s = self._last - start


def signature_figure(signatures: Mapping[str, Tensor]) -> Figure:
    """A heat map [E, D] of -1, 0 and +1 for each layer, given its signatures in force."""
    heights = [0.9 + 0.11 * len(signature_ED) for signature_ED in signatures.values()]
    figure, axes = _rows(heights, width=PAGE_WIDTH)
    for axis, (name, signature_ED) in zip(axes, signatures.items(), strict=True):
        draw_signatures(axis, signature_ED)
        axis.set(title=name, ylabel="tile")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("model dimension")
    legend = [
        Patch(facecolor=colour, edgecolor="#999999", label=f"{value:+d}" if value else "0")
        for value, colour in SIGNATURE_COLOURS.items()
    ]
    figure.suptitle("Signatures of the tiles", x=0.02, horizontalalignment="left")  # next to the legend
    figure.legend(handles=legend, loc="upper right", ncols=3, frameon=False)
    return figure


def usage_figure(usage: Mapping[str, Tensor]) -> Figure:
    """Bars of the share of assignments that each tile gets, [E] for each layer, with the equal share as a line."""
    figure, axes = _rows([1.4] * len(usage), width=PAGE_WIDTH)
    for axis, (name, usage_E) in zip(axes, usage.items(), strict=True):
        num_tiles = len(usage_E)
        axis.bar(range(num_tiles), usage_E.cpu().numpy(), color="#4477aa")
        axis.axhline(1 / num_tiles, color="#cc3311", linewidth=1, linestyle="--", label=f"equal share, 1/{num_tiles}")
        axis.set(title=name, ylabel="share", xlim=(-0.6, num_tiles - 0.4))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.margins(y=0.3)  # room for the legend
    axes[0].legend(loc="upper right", frameon=False)
    axes[-1].set_xlabel("tile")
    figure.suptitle("Share of the tokens of the validation that each tile got")
    return figure


def similarity_figure(signatures: Mapping[str, Tensor]) -> Figure:
    """For each layer the cosine of each pair of its signatures, given those in force [E, D]; layers side by side."""
    num_columns = min(len(signatures), 2)
    num_rows = math.ceil(len(signatures) / num_columns)
    figure = Figure(figsize=(0.9 + 2.3 * num_columns, 0.6 + 2.4 * num_rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axis, (name, signature_ED) in zip(axes, signatures.items(), strict=False):
        image = draw_similarity(axis, pairwise_cosine(signature_ED.float()))
        axis.set_title(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(signatures) :]:
        axis.set_axis_off()
    axes[0].set(xlabel="tile", ylabel="tile")
    figure.colorbar(image, ax=list(axes), label="cosine", fraction=0.03)
    figure.suptitle("Likeness of the signatures, tile by tile")
    return figure


def routing_figure(routing: Mapping[str, RoutingInfo], tokens: Sequence[str] | None) -> Figure:
    """For each layer a heat map [E, T] of one sequence: the softmax of the scores, a dot on each tile that was used.

    tokens: how the T tokens are written below; None numbers them.
    """
    num_tokens = max(len(info["tile_idx"]) for info in routing.values())
    heights = [0.6 + 0.1 * info["scores"].shape[-1] for info in routing.values()]
    figure, axes = _rows(heights, width=max(PAGE_WIDTH, 1.2 + 0.13 * num_tokens))
    for axis, (name, info) in zip(axes, routing.items(), strict=True):
        image = draw_routing(axis, info["scores"].softmax(dim=-1), info["tile_idx"], info["weight"] != 0)
        axis.set(title=name, ylabel="tile", xticks=[])
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    if tokens is None:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes[-1].set_xticks(range(len(tokens)), [printable(token) for token in tokens])
    axes[-1].set_xlabel("token")
    figure.colorbar(image, ax=axes, label="softmax of the scores", fraction=0.02)
    figure.suptitle("Where the first tokens of the validation went")
    return figure


def claim_figure(claims: Mapping[str, Tensor], class_names: Sequence[str]) -> Figure:
    """A heat map [C, E] for each layer: the share of a class's tokens that went to a tile, given claim rates [E, C].

    More than 32 classes stand in an order in which those with like claims are neighbours, the same in all layers.
    """
    if len(class_names) > MAX_CLASSES_BY_LABEL:
        return _many_claims_figure(claims, class_names)
    figure, axes = _rows([1.0 + 0.28 * len(class_names)] * len(claims), width=max(6.0, 2.0 + 0.42 * _num_tiles(claims)))
    for axis, (name, rate_EC) in zip(axes, claims.items(), strict=True):
        image = draw_claims(axis, rate_EC, class_names)
        axis.set_title(name)
        figure.colorbar(image, ax=axis, label="share of the class")
    axes[-1].set_xlabel("tile")
    figure.suptitle("Which class goes to which tile")
    return figure


def _many_claims_figure(claims: Mapping[str, Tensor], class_names: Sequence[str]) -> Figure:
    """Layers side by side; colours reach up to the largest share, tiles are ordered by where most of their claims stand."""
    rates = {name: rate_EC.T.cpu().numpy() for name, rate_EC in claims.items()}
    order_C = _order_by_likeness(np.concatenate(list(rates.values()), axis=1))
    figure = Figure(figsize=(1.6 + len(rates) * (0.5 + 0.13 * _num_tiles(claims)), 1.4 + 0.13 * len(class_names)), dpi=110)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    largest = max(float(rate_CE.max()) for rate_CE in rates.values())
    for axis, (name, rate_CE) in zip(axes, rates.items(), strict=True):
        shown_CE = rate_CE[order_C]
        tile_order = np.argsort(np.arange(len(order_C)) @ shown_CE**2 / (shown_CE**2).sum(axis=0).clip(1e-12), kind="stable")
        image = axis.imshow(
            shown_CE[:, tile_order], aspect="auto", cmap="Blues", vmin=0.0, vmax=largest, interpolation="nearest"
        )
        axis.set(title=name, xlabel="tile")
        axis.set_xticks(range(len(tile_order)), tile_order, fontsize=6, rotation=90)
        axis.set_yticks(range(len(order_C)), [class_names[index] for index in order_C], fontsize=7)
    figure.colorbar(image, ax=list(axes), label="share of the class", fraction=0.03)
    figure.suptitle("Which class goes to which tile; classes with like claims are neighbours")
    return figure


def _order_by_likeness(feature_CF: NDArray[np.float32]) -> NDArray[np.int64]:
    """The leaves of average-linkage clusters by cosine distance, int64 [C]; rows of zeros (classes never seen) come last."""
    from scipy.cluster.hierarchy import leaves_list, linkage  # takes a quarter of a second to import

    is_seen_C = feature_CF.any(axis=1)
    seen, unseen = np.flatnonzero(is_seen_C), np.flatnonzero(~is_seen_C)
    if len(seen) < 3:
        return np.concatenate([seen, unseen])
    leaves = leaves_list(linkage(feature_CF[seen], "average", metric="cosine", optimal_ordering=True))
    return np.concatenate([seen[leaves], unseen])


def _num_tiles(claims: Mapping[str, Tensor]) -> int:
    return max(len(rate_EC) for rate_EC in claims.values())


def _rows(heights: Sequence[float], width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 0.8 + sum(heights)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])
