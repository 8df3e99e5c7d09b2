"""How well the latents of a dictionary agree with planted features.

Shapes: N tokens, D width, F planted features, K latents.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from torch import Tensor, nn

RECOVERED = 0.9  # cosine, or correlation, above which a feature counts as recovered
MAIN = 0.5**0.5  # cosine above which a row is more its feature than all else together
CONTAINED = 0.5  # a row contains the parent where its part along the parent is at least this share of that along the child


class DirectionMatch(NamedTuple):
    """How the rows of a decoder agree with the directions of features.

    cosine_FK: of each feature with each row. best_F: the largest of a feature. matched_F: with the row that the feature gets
    when each row serves one feature at most and the sum is as large as can be; 0 for features that get none.
    """

    cosine_FK: Tensor
    best_F: Tensor
    matched_F: Tensor

    @property
    def is_recovered_F(self) -> Tensor:  # noqa: N802 (shape suffix)
        return self.best_F > RECOVERED

    @property
    def num_rows_F(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Rows whose cosine with the feature is above RECOVERED, int64: more than one where it is split."""
        return (self.cosine_FK > RECOVERED).sum(dim=1)


class ActivationMatch(NamedTuple):
    """How latents fire with features: the best latent of each feature by correlation, and by F1; nan without a token.

    correlation_F: Pearson's correlation of strength and activation. f1_F: F1 of "the latent is above 0"
    as an answer to "the feature fires".
    """

    correlation_F: Tensor
    f1_F: Tensor


class Absorption(NamedTuple):
    """rate: mean over the pairs of the share of a child's tokens in which the parent is absorbed. num_pairs: measured."""

    rate: float
    num_pairs: int


def match_directions(direction_FD: Tensor, decoder_KD: Tensor) -> DirectionMatch:
    """Compare directions with the rows of a decoder, by cosines in float64.

    Raises:
        ValueError: another width.
    """
    if direction_FD.shape[1] != decoder_KD.shape[1]:
        raise ValueError(f"width of the decoder ({decoder_KD.shape[1]}) must be that of the features ({direction_FD.shape[1]})")
    unit_FD, unit_KD = (nn.functional.normalize(rows.double(), dim=-1) for rows in (direction_FD, decoder_KD))
    cosine_FK = unit_FD @ unit_KD.T
    feature_M, latent_M = linear_sum_assignment(cosine_FK.numpy(), maximize=True)
    matched_F = torch.zeros(len(cosine_FK), dtype=torch.float64)
    matched_F[feature_M] = cosine_FK[feature_M, latent_M]
    return DirectionMatch(cosine_FK, cosine_FK.amax(dim=1), matched_F)


def match_activations(strength_NF: Tensor, z_NK: Tensor) -> ActivationMatch:
    """Compare when features and latents fire, over all pairs; both are sparse, and sums run in float64.

    Raises:
        ValueError: another number of tokens.
    """
    if len(strength_NF) != len(z_NK):
        raise ValueError(f"tokens of the latents ({len(z_NK)}) must be those of the features ({len(strength_NF)})")
    feature, latent = (csr_array(value.double().numpy()) for value in (strength_NF, z_NK))
    num_tokens = len(z_NK)
    mean_F, mean_K = (matrix.sum(axis=0) / num_tokens for matrix in (feature, latent))
    covariance_FK = (feature.T @ latent).toarray() / num_tokens - np.outer(mean_F, mean_K)
    std_F, std_K = (
        np.sqrt(np.maximum(matrix.multiply(matrix).sum(axis=0) / num_tokens - mean**2, 0.0))
        for matrix, mean in ((feature, mean_F), (latent, mean_K))
    )
    scale_FK = np.outer(std_F, std_K)
    correlation_FK = np.divide(covariance_FK, scale_FK, out=np.zeros_like(scale_FK), where=scale_FK > 0)
    fires, active = feature.sign(), latent.sign()
    count_F, count_K = fires.sum(axis=0), active.sum(axis=0)
    f1_FK = 2 * (fires.T @ active).toarray() / np.maximum(count_F[:, None] + count_K, 1)
    never_F = torch.from_numpy(count_F == 0)
    best = (torch.from_numpy(value.max(axis=1)).masked_fill(never_F, torch.nan) for value in (correlation_FK, f1_FK))
    return ActivationMatch(*best)


def measure_absorption(cosine_FK: Tensor, parent_F: Tensor, strength_NF: Tensor, z_NK: Tensor) -> Absorption:
    """How often the latents of children stand in for the latent of their parent.

    The latent of a parent is the one whose row has the largest cosine with it; parents without a cosine above sqrt(1/2) are
    left out. The latent of a child is, of the others, the one whose row has the largest cosine with the child. In a token in
    which the child fires, and so its parent does, the parent is absorbed if its latent is not active, the child's is, and the
    part of the child's row along the parent is at least half of that along the child.

    Children that never fire are left out. nan without a pair.

    Source: the planted case of arXiv:2409.14507, which finds the latents by probes.

    Args:
        cosine_FK: cosines of features with rows. parent_F: the parent of each child, -1 for other features.
    """
    rates: list[float] = []
    for child in (parent_F >= 0).nonzero().flatten().tolist():
        parent = int(parent_F[child])
        of_parent = int(cosine_FK[parent].argmax())
        is_token_N = strength_NF[:, child] > 0
        if cosine_FK[parent, of_parent] <= MAIN or not bool(is_token_N.any()) or cosine_FK.shape[1] < 2:
            continue
        others_K = cosine_FK[child].clone()
        others_K[of_parent] = -torch.inf
        of_child = int(others_K.argmax())
        contains_parent = bool(cosine_FK[parent, of_child] >= CONTAINED * cosine_FK[child, of_child].clamp(min=0))
        z_n = z_NK[is_token_N]
        is_absorbed_n = (z_n[:, of_parent] <= 0) & (z_n[:, of_child] > 0)
        rates.append(float(is_absorbed_n.double().mean()) if contains_parent else 0.0)
    return Absorption(sum(rates) / len(rates) if rates else float("nan"), len(rates))
