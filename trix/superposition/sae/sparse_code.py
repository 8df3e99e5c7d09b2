"""Sparse codes of activations, made and read at the cost of their entries: one dense product remains of a step's five.

Shapes: N tokens, D width, K latents, M entries of a code (N * active, where each token has the same number).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # tokens whose pre-activations are in memory at a time


class SparseCode(NamedTuple):
    """The entries of z [N, K] that may differ from 0, token by token.

    offset_N1: int64 [N + 1], where the entries of each token start, and M. latent_M: int64 in [0, K), each at most once for a
    token. value_M: float >= 0.
    """

    offset_N1: Tensor
    latent_M: Tensor
    value_M: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64: the token of each entry."""
        num_N = self.offset_N1.diff()
        return torch.repeat_interleave(torch.arange(len(num_N), device=num_N.device), num_N, output_size=len(self.latent_M))

    def dense(self, num_latents: int) -> Tensor:
        """z, float [N, K]."""
        z_NK = self.value_M.new_zeros(len(self.offset_N1) - 1, num_latents)
        return z_NK.index_put((self.tokens, self.latent_M), self.value_M)


# Which entries of pre-activations [n, K] are kept: (token, latent), int64 [m] each, in the order of the tokens.
Select = Callable[[Tensor], tuple[Tensor, Tensor]]


def top_entries(active: int) -> Select:
    """The ``active`` largest pre-activations of each token; which of equal ones is left to torch.topk."""

    def select(pre_nK: Tensor) -> tuple[Tensor, Tensor]:
        latent_nA = pre_nK.topk(active, sorted=False).indices
        token_nA = torch.arange(len(pre_nK), device=pre_nK.device).unsqueeze(-1).expand_as(latent_nA)
        return token_nA.flatten(), latent_nA.flatten()

    return select


def entries_above(threshold: float | Tensor) -> Select:
    """All pre-activations > threshold, a number or [K]."""

    def select(pre_nK: Tensor) -> tuple[Tensor, Tensor]:
        token_m, latent_m = (pre_nK > threshold).nonzero(as_tuple=True)
        return token_m, latent_m

    return select


def sparse_encode(x_ND: Tensor, weight_DK: Tensor, bias_K: Tensor, centre_D: Tensor, select: Select) -> SparseCode:
    """relu((x - centre) W + b), of the selected entries alone.

    Gradients reach x, W, b and centre through these entries. The pre-activations of ROWS tokens at a time are in memory, never
    all of them, and nothing of size [N, K] is kept for the backward pass.
    """
    value_M, latent_M, offset_N1 = _SparseEncode.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_DK, bias_K, centre_D, select
    )
    return SparseCode(offset_N1, latent_M, value_M)


def sparse_decode(code: SparseCode, weight_KD: Tensor) -> Tensor:
    """z W, float [N, D]; gradients reach the values and W."""
    offset_N = code.offset_N1[:-1]
    # torch's gradient of the values is a product for each entry. Its gradient of the weights is slower than ours.
    x_ND = F.embedding_bag(code.latent_M, weight_KD.detach(), offset_N, mode="sum", per_sample_weights=code.value_M)
    return _WeightGradient.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_KD, code.value_M.detach(), code.latent_M, code.tokens
    )


def transposed_product(code: SparseCode, token_M: Tensor, x_ND: Tensor, num_latents: int) -> Tensor:
    """z^T x, float [K, D]."""
    order_M = code.latent_M.argsort(stable=True)
    count_K = torch.bincount(code.latent_M, minlength=num_latents)
    offset_K = count_K.cumsum(0) - count_K
    return F.embedding_bag(token_M[order_M], x_ND, offset_K, mode="sum", per_sample_weights=code.value_M[order_M])


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_DK: Tensor, bias_K: Tensor, centre_D: Tensor, select: Select
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, latents, tokens = [], [], []
        for start in range(0, max(len(x_ND), 1), ROWS):  # once without tokens, too
            pre_nK = torch.addmm(bias_K, x_ND[start : start + ROWS] - centre_D, weight_DK)
            token_m, latent_m = select(pre_nK)
            values.append(pre_nK[token_m, latent_m].relu_())
            latents.append(latent_m)
            tokens.append(token_m + start)
        value_M, latent_M, token_M = (torch.cat(parts) for parts in (values, latents, tokens))
        offset_N1 = F.pad(torch.bincount(token_M, minlength=len(x_ND)).cumsum(0), (1, 0))
        ctx.save_for_backward(x_ND, weight_DK, centre_D, value_M, latent_M, token_M, offset_N1)
        ctx.mark_non_differentiable(latent_M, offset_N1)
        return value_M, latent_M, offset_N1

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x_ND, weight_DK, centre_D, value_M, latent_M, token_M, offset_N1 = ctx.saved_tensors
        code = SparseCode(offset_N1, latent_M, torch.where(value_M > 0, grad_M, 0.0))
        grad_x = grad_weight = grad_centre = None
        grad_K = code.value_M.new_zeros(weight_DK.shape[1]).index_add_(0, latent_M, code.value_M)
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(
                latent_M, weight_DK.t().contiguous(), offset_N1[:-1], mode="sum", per_sample_weights=code.value_M
            )
        if ctx.needs_input_grad[1]:
            grad_weight = transposed_product(code, token_M, x_ND - centre_D, weight_DK.shape[1]).t()
        if ctx.needs_input_grad[3]:
            grad_centre = -(weight_DK @ grad_K)
        return grad_x, grad_weight, grad_K, grad_centre, None


class _WeightGradient(torch.autograd.Function):
    """x = z W as it is; what comes back goes on to x, and as z^T g to W."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_KD: Tensor, value_M: Tensor, latent_M: Tensor, token_M: Tensor) -> Tensor:
        ctx.save_for_backward(value_M, latent_M, token_M)
        ctx.num_latents = len(weight_KD)
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        value_M, latent_M, token_M = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            code = SparseCode(latent_M.new_zeros(0), latent_M, value_M)
            grad_weight = transposed_product(code, token_M, grad_ND.contiguous(), ctx.num_latents)
        return grad_ND, grad_weight, None, None, None
