"""Maps of documents and latents, and heat maps of activations. matplotlib figures without pyplot: nothing global changes.

Legend: N tokens, P documents, K latents, M of them that are drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trix.introspection.symbols import SIGNATURE_COLOURS
from trix.superposition.analysis.stats import trim_outliers
from trix.superposition.types import Reducer2D

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.floating]
Values = npt.ArrayLike | Tensor

BACKGROUND = "#4a5568"
LATENT_COLOURS = (SIGNATURE_COLOURS[1], SIGNATURE_COLOURS[-1])
CLASSES_PER_COLUMN = 25  # of a legend
TAB_COLOURS = 10
MAX_TICKS = 100


def titles_map(
    Z_titles: Values,
    y: Values | Sequence[str],
    reducer: Reducer2D,
    trim_p: float = 95.0,
    figsize: tuple[float, float] = (8.0, 6.0),
) -> "Figure":
    """Documents as points of a plane, coloured by class, with a legend.

    The reducer learns its map here, from all documents; :func:`latents_labels_map` can use it afterwards. Then the documents
    farthest from the median point are left out of the picture, see :func:`~trix.superposition.analysis.trim_outliers`. The
    title says how many are left.

    Args:
        Z_titles: documents [P, K], as of :func:`~trix.superposition.analysis.mean_pool_by_title`.
        y: class of each document, [P], numbers or names.
        reducer: as of :func:`~trix.superposition.analysis.create_reducer`; to two components.
        trim_p: percentile of the distances up to which documents are shown, > 0 and <= 100.
        figsize: width and height in inches.

    Raises:
        ValueError: no documents, classes that are not one per document, values that are not finite, a trim_p out of range, or a
            reducer to another number of components.
    """
    from matplotlib import colormaps

    Z_PK = _finite(Z_titles, "Z_titles", "P, K")
    class_P = _array(y)
    if class_P.shape != Z_PK.shape[:1]:
        raise ValueError(f"y {class_P.shape} must be a class of each of the documents of Z_titles {Z_PK.shape}")
    if class_P.dtype.kind == "f" and np.isnan(class_P).any():
        raise ValueError(f"y ({np.count_nonzero(np.isnan(class_P))} are NaN) must be a class of each of {len(Z_PK)} documents")
    point_P2 = _points(reducer.fit_transform(Z_PK), len(Z_PK))
    is_shown_P = trim_outliers(point_P2, trim_p)
    classes = np.unique(class_P)
    is_few = len(classes) <= TAB_COLOURS
    colours = colormaps["tab10"](range(len(classes))) if is_few else colormaps["turbo"](np.linspace(0, 1, len(classes)))

    figure, axes = _plane(figsize)
    for name, colour in zip(classes.tolist(), colours, strict=True):
        across_N, up_N = point_P2[is_shown_P & (class_P == name)].T
        axes.scatter(across_N, up_N, s=12, alpha=0.7, linewidths=0, color=[colour], label=_caption(name))
    shown = f"{np.count_nonzero(is_shown_P):,} of {len(Z_PK):,} documents"
    axes.set_title(shown if is_shown_P.all() else f"{shown}, without outliers")
    columns = -(-len(classes) // CLASSES_PER_COLUMN)
    figure.legend(loc="outside right upper", title="class", frameon=False, ncols=columns)
    return figure


def latents_labels_map(
    reducer: Reducer2D,
    Z_titles: Values,
    medoids: npt.ArrayLike | Tensor,
    labels_text: Sequence[str],
    is_sport: npt.ArrayLike | Tensor | None = None,
    alpha_bg: float = 0.2,
    figsize: tuple[float, float] = (10.0, 8.0),
) -> "Figure":
    """Latents as labelled points among the documents in which they are active.

    With documents p at points x_p, latent j stands at their mean, weighted by its activation:

        sum_p Z[p, j] x_p / sum_p Z[p, j].

    So the place of a latent says which documents it is active in, in the same way for every reducer. Latents that are active in
    no document have no place; the title counts them.

    Differs from integral-superposition, which draws as many unit vectors as there are medoids: a reducer fitted on K columns
    refuses them unless there are K, and where one lies depends on the unit of the activations.

    Args:
        reducer: fitted on documents of the same K columns, as :func:`titles_map` leaves it.
        Z_titles: documents [P, K], >= 0.
        medoids: the latents to draw, int [M], as columns of Z_titles: those of
            :func:`~trix.superposition.merge.medoids_from_labels` where its columns are all latents of the autoencoder, and
            ``range(K)`` where they are those of a merged one.
        labels_text: text of each of the M latents.
        is_sport: bool [M], which latents have the colour of "sport"; the others have that of "other". None: all have one.
        alpha_bg: opacity of the documents, in [0, 1].
        figsize: width and height in inches.

    Raises:
        ValueError: no latents, one that is not a column of Z_titles, labels or is_sport of another length, Z_titles that is
            negative or not finite, alpha_bg out of range, or a reducer to another number of components, or not fitted.
    """
    Z_PK = _finite(Z_titles, "Z_titles", "P, K")
    latent_M = _latents(medoids, Z_PK.shape[1])
    if Z_PK.min() < 0:
        raise ValueError(f"Z_titles (smallest: {Z_PK.min():g}) must be >= 0")
    if len(labels_text) != len(latent_M):
        raise ValueError(f"labels_text ({len(labels_text)}) must be as many as the latents in medoids ({len(latent_M)})")
    if not 0 <= alpha_bg <= 1:
        raise ValueError(f"alpha_bg ({alpha_bg}) must be >= 0 and <= 1")
    kinds = {"latents": np.ones(len(latent_M), dtype=bool)} if is_sport is None else _kinds(is_sport, len(latent_M))
    point_P2 = _points(reducer.transform(Z_PK), len(Z_PK))
    point_M2, is_active_M = _weighted_means(point_P2, Z_PK[:, latent_M])

    figure, axes = _plane(figsize)
    axes.scatter(point_P2[:, 0], point_P2[:, 1], s=8, alpha=alpha_bg, linewidths=0, color=BACKGROUND, label="documents")
    for colour, (name, is_kind_M) in zip(LATENT_COLOURS, kinds.items(), strict=False):
        across_M, up_M = point_M2[is_kind_M & is_active_M].T
        axes.scatter(across_M, up_M, s=26, color=colour, edgecolors="white", label=name)
    for latent in np.flatnonzero(is_active_M).tolist():
        note = axes.annotate(
            _caption(labels_text[latent]), point_M2[latent], xytext=(4, 3), textcoords="offset points", fontsize=8
        )
        note.set_in_layout(False)  # to measure all takes long, and a long label would shrink the map
    num_active = np.count_nonzero(is_active_M)
    inactive = f"; {len(latent_M) - num_active:,} more are active in no document" if num_active < len(latent_M) else ""
    axes.set_title(f"{num_active:,} latents, {len(Z_PK):,} documents{inactive}")
    axes.legend(frameon=False)
    return figure


def activation_heatmap(
    activations: Values,
    token_labels: Sequence[object],
    latent_labels: Sequence[object],
    figsize: tuple[float, float] = (12.0, 8.0),
    top_k: int = 50,
) -> "Figure":
    """The latents with the largest activations (rows, the largest first, equal ones by number) on each token (columns).

    Where there is no room for the labels of all tokens, every second, third, ... has one.

    Args:
        activations: of tokens and latents, [N, K].
        token_labels: N labels, shown as texts with visible spaces. latent_labels: K labels, shown as texts.
        figsize: width and height in inches.
        top_k: latents shown at most.

    Raises:
        ValueError: no tokens or no latents, labels of another number, values that are not finite, or top_k < 1.
    """
    from matplotlib.figure import Figure

    from trix.introspection.plots import printable

    z_NK = _finite(activations, "activations", "N, K")
    for name, labels, size in (("token_labels", token_labels, len(z_NK)), ("latent_labels", latent_labels, z_NK.shape[1])):
        if len(labels) != size:
            raise ValueError(f"{name} ({len(labels)}) must be as many as those of activations {z_NK.shape}: {size}")
    if top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be >= 1")
    latent_M = np.argsort(-z_NK.max(axis=0), kind="stable")[:top_k]
    shown_MN = z_NK[:, latent_M].T

    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.add_subplot()
    lowest = min(float(shown_MN.min()), 0.0)
    highest = float(shown_MN.max()) if shown_MN.max() > lowest else lowest + 1.0
    image = axes.imshow(shown_MN, aspect="auto", interpolation="nearest", cmap="Blues", vmin=lowest, vmax=highest)
    figure.colorbar(image, ax=axes, label="activation", fraction=0.03)
    tokens = range(0, len(z_NK), -(-len(z_NK) // MAX_TICKS))
    token_texts = [printable(str(token_labels[token])) for token in tokens]
    rotation = 90 if max(map(len, token_texts)) > 1 else 0
    axes.set_xticks(tokens, token_texts, rotation=rotation, fontfamily="monospace", fontsize=8)
    rows = range(0, len(latent_M), -(-len(latent_M) // MAX_TICKS))
    axes.set_yticks(rows, [_caption(latent_labels[latent_M[row]]) for row in rows], fontsize=8)
    axes.set(xlabel="token", ylabel="latent")
    return figure


def _plane(figsize: tuple[float, float]) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="dimension 1", ylabel="dimension 2")
    return figure, axes


def _caption(label: object) -> str:
    """The label as a text of words: control characters are visible, spaces stay spaces."""
    from trix.introspection.plots import printable

    return " ".join(printable(word) for word in str(label).split(" "))


def _finite(values: Values, name: str, axes: str) -> FloatArray:
    """A matrix that is neither empty nor has NaN or infinity, float32."""
    array: FloatArray = torch.as_tensor(values).detach().cpu().float().numpy()
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} {array.shape} must be [{axes}], each >= 1")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} ({np.count_nonzero(~np.isfinite(array))} values that are not) must be finite")
    return array


def _points(points: Any, num_rows: int) -> npt.NDArray[np.float64]:
    point_N2 = np.asarray(points, dtype=np.float64)
    if point_N2.shape != (num_rows, 2):
        raise ValueError(f"points of the reducer {point_N2.shape} must be {(num_rows, 2)}: two components")
    num_broken = np.count_nonzero(~np.isfinite(point_N2))
    if num_broken:
        raise ValueError(f"points of the reducer ({num_broken} values that are not) must be finite")
    return point_N2


def _latents(medoids: npt.ArrayLike | Tensor, num_columns: int) -> npt.NDArray[np.int64]:
    latent_M = _array(medoids)
    if latent_M.ndim != 1 or len(latent_M) == 0 or latent_M.dtype.kind not in "iu":
        raise ValueError(f"medoids ({latent_M.dtype} {latent_M.shape}) must be int [M] with M >= 1")
    if latent_M.min() < 0 or latent_M.max() >= num_columns:
        raise ValueError(
            f"medoids ({latent_M.min()} to {latent_M.max()}) must be >= 0 and < columns of Z_titles ({num_columns}); "
            f"those of merged latents are range({num_columns})"
        )
    return latent_M.astype(np.int64)


def _kinds(is_sport: npt.ArrayLike | Tensor, num_latents: int) -> dict[str, npt.NDArray[np.bool_]]:
    flag_M = _array(is_sport)
    if flag_M.shape != (num_latents,) or flag_M.dtype.kind not in "biu":
        raise ValueError(f"is_sport ({flag_M.dtype} {flag_M.shape}) must be bool [M], M = {num_latents} latents in medoids")
    return {"sport": flag_M.astype(bool), "other": ~flag_M.astype(bool)}


def _array(values: npt.ArrayLike | Tensor) -> npt.NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _weighted_means(
    point_P2: npt.NDArray[np.float64], weight_PM: FloatArray
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The mean of the points by the weights of each column, [M, 2], and bool [M]: whether the column has any weight."""
    weight_PM = weight_PM.astype(np.float64)
    total_M = weight_PM.sum(axis=0)
    return (weight_PM.T @ point_P2) / np.where(total_M > 0, total_M, 1)[:, None], total_M > 0
