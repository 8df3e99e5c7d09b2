"""Signatures: short ternary vectors that say what a tile responds to. Reading them, scoring with them, comparing them."""

import torch
from torch import Tensor


def signatures_from_codes(codes: Tensor) -> Tensor:
    """Read each tile's signature from its ternary weight: s[e, k] = sign(sum_n code[e, n, k]).

    Args:
        codes: [..., N, K] in {-1, 0, +1}, any dtype.

    Returns:
        [..., K] in {-1, 0, +1}, in the dtype of codes; 0 where the column's votes cancel.
    """
    return codes.sum(dim=-2).sign().to(codes.dtype)


def signature_scores(x: Tensor, signatures: Tensor) -> Tensor:
    """score[t, e] = <x_t, s_e> / sqrt(nnz(s_e)): agreement per active dimension, in standard deviations of x.

    Args:
        x: float [..., D]. signatures: [E, D] in {-1, 0, +1}, same dtype. A signature without active dimension scores 0.

    Returns:
        float [..., E].

    Raises:
        ValueError: the last dimensions differ.
    """
    if x.shape[-1] != signatures.shape[-1]:
        raise ValueError(f"last dimension of x ({x.shape[-1]}) must equal the signatures' ({signatures.shape[-1]})")
    return (x @ signatures.T) * inverse_sqrt_active(signatures)


def inverse_sqrt_active(signatures: Tensor) -> Tensor:
    """1 / sqrt(max(nnz(s_e), 1)) for signatures [E, D]: [E], no gradient."""
    return signatures.detach().ne(0).sum(dim=-1).clamp_min(1).to(signatures.dtype).rsqrt()


def pairwise_difference(signatures: Tensor) -> Tensor:
    """difference[i, j] = fraction of positions at which signatures i and j ([E, D], ternary) differ: float [E, E]."""
    one_hot = torch.stack([signatures == value for value in (-1, 0, 1)]).to(torch.float32)
    num_equal = torch.einsum("ved,vfd->ef", one_hot, one_hot)
    return 1.0 - num_equal / signatures.shape[-1]


def signature_diversity(signatures: Tensor) -> Tensor:
    """Mean of :func:`pairwise_difference` over distinct pairs: a float32 scalar in [0, 1]; 0 for fewer than two tiles."""
    num_tiles = signatures.shape[0]
    if num_tiles < 2:
        return torch.zeros((), device=signatures.device)
    return pairwise_difference(signatures).sum() / (num_tiles * (num_tiles - 1))
