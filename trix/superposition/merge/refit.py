"""The decoder of merged latents, by ridge regression over a stream of activations.

Legend: N tokens, B tokens of a batch, D width, K latents, M merged latents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trix.superposition.analysis.encoding import SparseCoder, encoded_batches
from trix.superposition.merge.medoid import labels_from_merge_matrix

ActivationBatches = Callable[[], Iterable[Tensor]]
PairBatches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
MergeMap = npt.ArrayLike | Tensor
_Item = TypeVar("_Item")


class Refit(NamedTuple):
    """x_hat = (z M) W_dec + b_dec on the device of the refit.

    W_dec_MD: float32, not normalised. b_dec_D: float32. num_tokens: tokens that it was fitted to. explained_variance: on these
    tokens, 1 - sum |x - x_hat|^2 / sum |x - mean|^2; NaN where all x are equal.
    """

    W_dec_MD: Tensor
    b_dec_D: Tensor
    num_tokens: int
    explained_variance: float


class _Moments:
    """Sums of the products of merged latents and activations, float64, about a point near their means.

    Without that point the squares of large means would use up the digits of small variances.
    """

    def __init__(self, z_BM: Tensor, x_BD: Tensor) -> None:
        self.z0_M, self.x0_D = z_BM.double().mean(dim=0), x_BD.double().mean(dim=0)
        self.z_M, self.x_D = torch.zeros_like(self.z0_M), torch.zeros_like(self.x0_D)
        self.zz_MM = z_BM.new_zeros(len(self.z_M), len(self.z_M), dtype=torch.float64)
        self.zx_MD = z_BM.new_zeros(len(self.z_M), len(self.x_D), dtype=torch.float64)
        self.xx = 0.0
        self.num_tokens = 0

    def add(self, z_BM: Tensor, x_BD: Tensor) -> None:
        z_BM, x_BD = z_BM.double() - self.z0_M, x_BD.double() - self.x0_D
        self.z_M += z_BM.sum(dim=0)
        self.x_D += x_BD.sum(dim=0)
        self.zz_MM.addmm_(z_BM.T, z_BM)
        self.zx_MD.addmm_(z_BM.T, x_BD)
        self.xx += float(x_BD.square().sum())
        self.num_tokens += len(z_BM)

    def solved(self, l2: float) -> Refit:
        mean_z_M, mean_x_D = self.z_M / self.num_tokens, self.x_D / self.num_tokens
        zz_MM = self.zz_MM - self.num_tokens * torch.outer(mean_z_M, mean_z_M)
        zx_MD = self.zx_MD - self.num_tokens * torch.outer(mean_z_M, mean_x_D)
        xx = self.xx - self.num_tokens * float(mean_x_D.square().sum())
        # In units in which each latent has variance 1, latents of very different sizes are no ill-conditioned problem.
        unit_M = (zz_MM.diagonal().clamp_min(0) + l2).sqrt()
        penalised_MM = zz_MM.clone()
        penalised_MM.diagonal().add_(l2)
        factor_MM, info = torch.linalg.cholesky_ex(penalised_MM / torch.outer(unit_M, unit_M))
        if int(info) != 0:
            raise ValueError(f"l2 ({l2}) must be larger: some merged latents are linear combinations of others")
        W_dec_MD = torch.cholesky_solve(zx_MD / unit_M[:, None], factor_MM) / unit_M[:, None]
        b_dec_D = self.x0_D + mean_x_D - (self.z0_M + mean_z_M) @ W_dec_MD
        explained = float(2 * (W_dec_MD * zx_MD).sum() - (W_dec_MD * (zz_MM @ W_dec_MD)).sum())
        return Refit(W_dec_MD.float(), b_dec_D.float(), self.num_tokens, explained / xx if xx > 0 else float("nan"))


def merged_latents(z_NK: Tensor, label_K: Tensor, num_merged: int) -> Tensor:
    """z M: the sum of the latents of each cluster, [N, M]."""
    return z_NK.new_zeros(len(z_NK), num_merged).index_add_(1, label_K, z_NK)


def ridge_refit(XZ_iter: PairBatches, merge_map: MergeMap, l2: float = 1e-3, device: torch.device | str = "cpu") -> Refit:
    """Fit the decoder of merged latents: argmin over W and b of sum_n |x_n - (z_n M) W - b|^2 + l2 |W|^2.

    The sum runs over all tokens, as in scikit-learn's Ridge, so l2 weighs less the more tokens there are; b is not penalised.
    One pass; memory for M x M and M x D float64. Centring is global, and W is left as long as it is: means of single batches
    and rows of norm 1 would each undo the fit.

    Args:
        XZ_iter: zero-argument callable that gives batches (x [B, D], z [B, K]): what to reconstruct, and the latents.
        merge_map: cluster of each latent [K], or the merge matrix [K, M].
        l2: ridge penalty, > 0.

    Raises:
        ValueError: l2 <= 0, no tokens, shapes that do not fit, values that are not finite, or l2 too small to solve.
        TypeError: XZ_iter is not callable.
    """
    if not l2 > 0:
        raise ValueError(f"l2 ({l2}) must be > 0: a latent that never fires would leave its row of W open")
    label_K = torch.as_tensor(labels_from_merge_matrix(merge_map)).to(device)
    num_merged = int(label_K.max()) + 1
    moments: _Moments | None = None
    for x_BD, z_BK in _called(XZ_iter, "XZ_iter"):
        if z_BK.shape != (len(x_BD), len(label_K)):
            raise ValueError(f"z {tuple(z_BK.shape)} must be [B ({len(x_BD)}), K ({len(label_K)})]")
        if len(x_BD) == 0:
            continue
        x_BD, z_BM = x_BD.to(device), merged_latents(z_BK.to(device), label_K, num_merged)
        if not (torch.isfinite(x_BD).all() and torch.isfinite(z_BM).all()):
            raise ValueError("activations and latents must be finite, a batch has NaN or infinity")
        if moments is None:
            moments = _Moments(z_BM, x_BD)
        moments.add(z_BM, x_BD)
    if moments is None:
        raise ValueError("tokens to refit to (0) must be at least 1")
    return moments.solved(l2)


def streaming_refit(
    XZ_iter: PairBatches, M: MergeMap, l2: float = 1e-3, device: torch.device | str = "cpu"
) -> npt.NDArray[np.float32]:
    """The decoder [D, M] of :func:`ridge_refit`, float32, without its intercept."""
    return _columns(ridge_refit(XZ_iter, M, l2, device))


def merge_and_refit_decoder(
    X_iter: ActivationBatches, sae: SparseCoder, M: MergeMap, l2: float = 1e-3, device: torch.device | str = "cpu"
) -> npt.NDArray[np.float32]:
    """The decoder [D, M] of merged latents, float32: :func:`ridge_refit` to the activations and what `sae` makes of them.

    It belongs to latents z M and the intercept of the fit; :func:`~trix.superposition.merge.merge_sae` keeps the three
    together.

    Args:
        X_iter: zero-argument callable that gives batches [B, D] of activations.

    Raises: as :func:`ridge_refit`.
    """
    return _columns(ridge_refit(encoded_pairs(X_iter, sae, device), M, l2, device))


def encoded_pairs(X_iter: ActivationBatches, sae: SparseCoder, device: torch.device | str) -> PairBatches:
    """A callable that gives (x, z) for the batches of `X_iter`."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        return encoded_batches(sae, _called(X_iter, "X_iter"), device)

    return pairs


def _called(batches: Callable[[], Iterable[_Item]], name: str) -> Iterable[_Item]:
    if not callable(batches):
        raise TypeError(f"{name} ({type(batches).__name__}) must be a callable without arguments that gives batches")
    return batches()


def _columns(refit: Refit) -> npt.NDArray[np.float32]:
    decoder_DM: npt.NDArray[np.float32] = refit.W_dec_MD.T.contiguous().cpu().numpy()
    return decoder_DM
