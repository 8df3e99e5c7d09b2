"""Autoencoders in which each latent learns the threshold that it must exceed (arXiv:2407.14435)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trix.superposition.sae.base import SAE, SAEStep, check_threshold
from trix.superposition.sae.sparse_code import SparseCode, entries_above, sparse_encode
from trix.superposition.sae.standard import step_of_latents


class JumpReLUSAE(SAE):
    """z = p where p > threshold_k, else 0, with p = (x - b_dec) W_enc + b_enc.

    The loss is the mean of (x_hat - x)^2 plus l0 times the number of active latents.

    Neither term has a gradient for the threshold. As in the source it is estimated from the pre-activations that are within
    ``bandwidth / 2`` of it: -threshold / bandwidth times that of z, and -1 / bandwidth times that of the count.

    Args:
        l0: weight of the penalty on the number of active latents. bandwidth: as above. first_threshold: of every latent.

    Raises:
        ValueError: l0 < 0, bandwidth or first_threshold <= 0, and as :class:`SAE`.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        d_model: int,
        k: int,
        *,
        l0: float = 1e-3,
        bandwidth: float = 0.1,
        first_threshold: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(d_model, k, **settings)
        if not l0 >= 0:
            raise ValueError(f"l0 ({l0}) must be >= 0")
        for name, value in {"bandwidth": bandwidth, "first_threshold": first_threshold}.items():
            if not value > 0:
                raise ValueError(f"{name} ({value}) must be > 0")
        self.l0, self.bandwidth, self.first_threshold = l0, bandwidth, first_threshold
        self.log_threshold_K = nn.Parameter(torch.full((k,), math.log(first_threshold)))

    @property
    def threshold(self) -> Tensor:
        """float [K], > 0."""
        return self.log_threshold_K.exp()

    @torch.no_grad()
    def set_threshold(self, threshold_K: Tensor) -> None:
        """Take these thresholds, float [K].

        Raises:
            ValueError: one is < 0.
        """
        check_threshold(threshold_K)
        self.log_threshold_K.copy_(threshold_K.log())

    def settings(self) -> dict[str, Any]:
        return {
            "l0": self.l0,
            "bandwidth": self.bandwidth,
            "first_threshold": self.first_threshold,
            "dead_window": self.dead_window,
        }

    def code(self, x_ND: Tensor) -> SparseCode:
        return sparse_encode(self.scaled(x_ND), self.W_enc, self.b_enc, self.centre, entries_above(self.threshold.detach()))

    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        pre_NK = self.pre_activations(self.scaled(x_ND)).relu()
        z_NK, is_active_NK = _Jump.apply(  # type: ignore[no-untyped-call]
            pre_NK, self.threshold, self.bandwidth
        )
        return step_of_latents(self, z_NK, target_NO, self.l0 * is_active_NK.sum(dim=-1).mean())


class _Jump(torch.autograd.Function):
    """(p where p > threshold, 1 where p > threshold), with the estimated gradients of the threshold."""

    @staticmethod
    def forward(ctx: Any, pre_NK: Tensor, threshold_K: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre_NK, threshold_K)
        ctx.bandwidth = bandwidth
        is_active_NK = (pre_NK > threshold_K).to(pre_NK.dtype)
        return pre_NK * is_active_NK, is_active_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_z_NK, grad_active_NK = gradients
        pre_NK, threshold_K = ctx.saved_tensors
        is_near_NK = ((pre_NK - threshold_K).abs() <= ctx.bandwidth / 2).to(pre_NK.dtype)
        of_threshold_NK = -(threshold_K * grad_z_NK + grad_active_NK) * is_near_NK / ctx.bandwidth
        return grad_z_NK * (pre_NK > threshold_K), of_threshold_NK.sum(dim=0), None
