"""Signatures: short ternary vectors that say what a tile responds to. Reading them, scoring with them, comparing them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trix.functional.autocast import without_autocast
from trix.functional.ternary import straight_through, threshold_ternary

COSINE_TOLERANCE = 1e-6  # rounding must not part what is equal


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
    x_TD = x.reshape(-1, x.shape[-1])
    with without_autocast(x):
        score_TE = _Scores.apply(x_TD, signatures, inverse_sqrt_active(signatures))  # type: ignore[no-untyped-call]
    return score_TE.reshape(*x.shape[:-1], signatures.shape[0])


class _Scores(torch.autograd.Function):
    # The factor of each column is applied where the arrays are small or already there: nothing but the product has T x E.
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, signatures: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, signatures, factor)
        return (x @ signatures.T).mul_(factor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, signatures, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        factor = factor.unsqueeze(-1)
        grad_x = grad @ (signatures * factor)
        grad_signatures = (grad.T @ x).mul_(factor)
        return grad_x, grad_signatures, None


def inverse_sqrt_active(signatures: Tensor) -> Tensor:
    """1 / sqrt(max(nnz(s_e), 1)) for signatures [E, D] in {-1, 0, +1}: [E], no gradient."""
    return signatures.detach().abs().sum(dim=-1).clamp_min(1).rsqrt()


def pairwise_cosine(values: Tensor) -> Tensor:
    """Cosine of each row of [E, D] with each: [E, E]; 0 with a row of zeros."""
    unit = F.normalize(values, dim=-1)
    return unit @ unit.T


def redundant_pairs(signatures: Tensor, min_cosine: float, in_use: Tensor | None = None) -> list[tuple[int, int, float]]:
    """(i, j, cosine), i < j, of the rows of [E, D] whose cosine is >= min_cosine up to rounding; most alike first.

    Args:
        in_use: bool [E]; the others are in no pair.
    """
    cosine = pairwise_cosine(signatures.float())
    is_pair = cosine >= min_cosine - COSINE_TOLERANCE
    if in_use is not None:
        is_pair &= in_use & in_use.unsqueeze(-1)
    pairs = [(i, j, float(cosine[i, j])) for i, j in is_pair.triu(diagonal=1).nonzero().tolist()]
    return sorted(pairs, key=lambda pair: -pair[2])


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


def differentiable_diversity(raw: Tensor, threshold: float) -> Tensor:
    """:func:`signature_diversity` of the raw signatures' ternary form, exactly, with a gradient that the sign does not have.

    The gradient is that of the expected diversity when position d of tile e is +1 with probability q((raw - threshold) /
    temperature), -1 with q((-raw - threshold) / temperature) and 0 otherwise, q(z) = (1 + z / (1 + |z|)) / 2 and temperature =
    max(root mean square of raw, threshold). The slope of q falls with 1 / z^2 only, so that it still reaches signatures which
    have collapsed far from the threshold; there a logistic curve would be flat. The other tiles count by the value they have
    now: a position moves away from the value that most tiles share. Tiles that are equal to the bit get equal gradients and
    stay equal: those are re-seeded instead (:mod:`trix.routing.diversity`).

    Args:
        raw: float [E, D]; its ternary form is its sign where |raw| > threshold, else 0.

    Returns:
        A scalar in [0, 1], in at least float32; 0 for fewer than two tiles.
    """
    num_tiles, width = raw.shape
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if num_tiles < 2:
        return raw.new_zeros(())
    ternary = threshold_ternary(raw.detach(), threshold)
    temperature = raw.detach().square().mean().sqrt().clamp_min(threshold)
    positive, negative = _soft_step((raw - threshold) / temperature), _soft_step((-raw - threshold) / temperature)
    probability_VED = torch.stack([negative, 1.0 - positive - negative, positive])
    value_VED = straight_through(torch.stack([ternary == value for value in (-1, 0, 1)]), probability_VED)
    # sum over pairs i != j of <v_i, v_j> = |sum_i v_i|^2 - sum_i |v_i|^2: no E x E product.
    num_equal = value_VED.sum(dim=1).square().sum() - value_VED.square().sum()
    return 1.0 - num_equal / (num_tiles * (num_tiles - 1) * width)


def _soft_step(z: Tensor) -> Tensor:
    return 0.5 + 0.5 * F.softsign(z)


def signature_diversity_loss(raw: Tensor, threshold: float, target_diversity: float = 0.5) -> Tensor:
    """relu(target_diversity - diversity), see :func:`differentiable_diversity`: a scalar, exactly 0 from the target on.

    A single tile has nothing to differ from: its loss is 0.

    Raises:
        ValueError: target_diversity outside [0, 1].
    """
    check_target_diversity(target_diversity)
    if raw.shape[0] < 2:
        return raw.new_zeros(())
    return F.relu(target_diversity - differentiable_diversity(raw, threshold))


def check_target_diversity(target_diversity: float) -> None:
    """Raises ValueError where it is outside [0, 1]."""
    if not 0.0 <= target_diversity <= 1.0:
        raise ValueError(f"target_diversity ({target_diversity}) must be >= 0 and <= 1")
