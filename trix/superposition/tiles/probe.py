"""Predicting the tile of a token from the latents that are enriched on tiles.

Legend: N tokens, D width, K latents, F features, E tiles.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trix.superposition.backends.base_model import Site
from trix.superposition.tiles.traffic import Traffic

ROUTER_IN = "router_in"
MAX_ITERATIONS = 300
MAX_PROBE_TOKENS = 6144


class ProbeScores(NamedTuple):
    """Share of held-out tokens whose tile is predicted, each by a logistic regression on standardised features.

    latents: from the latents asked for. like_latents: from as many of the others, as often active as those
    (:func:`as_often_active`), for what is active more often says more of anything. random_latents: from as many active ones of
    the others, drawn at random. raw: from the activation itself, where the router's choice is linear, less its balance bias.
    majority: the commonest tile of the training part for all tokens. num_latents: features of the first. num_controls: of the
    next two, fewer where there are no more; they are NaN without any. num_tokens: held-out tokens.
    """

    latents: float
    like_latents: float
    random_latents: float
    raw: float
    majority: float
    num_latents: int
    num_controls: int
    num_tokens: int


def check_router_in(site: Site) -> None:
    """Raise ValueError unless the site is router_in: signatures are compared with nothing else."""
    if site.name != ROUTER_IN:
        raise ValueError(f"site ({site}) must be {ROUTER_IN}.{site.layer}: signatures are compared with nothing else")


def as_often_active(count_K: npt.NDArray[np.int64], chosen: Sequence[int]) -> list[int]:
    """As many other latents: pairs with the chosen ones whose numbers of active tokens differ least in all, as logarithms.

    Latents that are never active are left out, so there may be fewer.
    """
    from scipy.optimize import linear_sum_assignment

    others = np.setdiff1d(np.flatnonzero(count_K), chosen)
    log_K = np.log(np.maximum(count_K, 1))
    _, place = linear_sum_assignment(np.abs(log_K[list(chosen)][:, None] - log_K[others]))
    return [int(latent) for latent in others[place]]


def tile_probe(training: Traffic, held_out: Traffic, latents: Sequence[int], site: Site, seed: int = 0) -> ProbeScores:
    """Predict tiles of held-out documents from some latents, next to four controls.

    At most 6144 tokens of each part are used, drawn with the seed.

    Args:
        latents: those to predict from, as the top latents of all tiles by :meth:`~.contingency.Contingency.top_latents` in the
            training part. site: where the activations were taken.

    Raises:
        ValueError: a site other than router_in, no latents, one twice or outside [0, K), or training tokens of a single tile.
    """
    check_router_in(site)
    chosen = list(latents)
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < training.num_latents:
        raise ValueError(f"latents ({len(chosen)}) must be different, >= 0 and < {training.num_latents}, and at least one")
    draw = np.random.default_rng(seed)
    parts = [_drawn(part, draw) for part in (training, held_out)]
    tiles = [part.tile_N[rows] for part, rows in zip((training, held_out), parts, strict=True)]
    if len(np.unique(tiles[0])) < 2:
        raise ValueError(f"tiles of the training tokens ({len(np.unique(tiles[0]))}) must be >= 2")
    count_K = training.latent_NK.getnnz(axis=0)
    random = draw.permutation(np.setdiff1d(np.flatnonzero(count_K), chosen))[: len(chosen)].tolist()

    def score(wanted: list[int]) -> float:
        features = [part.latent_NK[rows][:, wanted] for part, rows in zip((training, held_out), parts, strict=True)]
        return _accuracy(features, tiles) if wanted else float("nan")

    majority = np.bincount(tiles[0]).argmax()
    raw = [part.x_ND[rows].numpy() for part, rows in zip((training, held_out), parts, strict=True)]
    return ProbeScores(
        latents=score(chosen),
        like_latents=score(as_often_active(count_K, chosen)),
        random_latents=score(random),
        raw=_accuracy(raw, tiles),
        majority=float((tiles[1] == majority).mean()),
        num_latents=len(chosen),
        num_controls=len(random),
        num_tokens=len(tiles[1]),
    )


def _drawn(part: Traffic, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.sort(draw.permutation(part.num_tokens)[:MAX_PROBE_TOKENS])


def _accuracy(features: list[Any], tiles: list[npt.NDArray[np.int64]]) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    dense = [value.toarray() if sparse.issparse(value) else value for value in features]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-3, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit on iterations holds for all probes alike
        model.fit(dense[0], tiles[0])
    return float(model.score(dense[1], tiles[1]))
