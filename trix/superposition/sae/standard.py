"""The autoencoder with a penalty on the sum of its latents (arXiv:2309.08600)."""

from typing import Any

import torch
from torch import Tensor

from trix.superposition.sae.base import SAE, SAEStep
from trix.superposition.sae.sparse_code import SparseCode, entries_above, sparse_encode


class SparseAutoencoder(SAE):
    """z = relu((x - b_dec) W_enc + b_enc), with the loss mean (x_hat - x)^2 + l1 * sum_k z_k |W_dec[k]|.

    The sum over the latents is weighted by the norms of their rows, so that a longer row cannot make a latent cheaper; the
    interface that this class comes from takes the mean over all k latents, which makes the penalty k times smaller.

    Args:
        l1: weight of the penalty.

    Raises:
        ValueError: l1 < 0, and as :class:`SAE`.
    """

    architecture = "standard"
    has_unit_decoder = False

    def __init__(self, d_model: int, k: int, *, l1: float = 1e-3, **settings: Any) -> None:
        super().__init__(d_model, k, **settings)
        if not l1 >= 0:
            raise ValueError(f"l1 ({l1}) must be >= 0")
        self.l1 = l1

    def settings(self) -> dict[str, Any]:
        return {"l1": self.l1, "dead_window": self.dead_window}

    def code(self, x_ND: Tensor) -> SparseCode:
        return sparse_encode(self.scaled(x_ND), self.W_enc, self.b_enc, self.centre, entries_above(0.0))

    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        z_NK = self.pre_activations(self.scaled(x_ND)).relu()
        penalty = self.l1 * (z_NK @ self.W_dec.norm(dim=-1)).mean()
        return step_of_latents(self, z_NK, target_NO, penalty)


def step_of_latents(sae: SAE, z_NK: Tensor, target_NO: Tensor, penalty: Tensor) -> SAEStep:
    """Reconstruction from latents in full, float [N, K], and a penalty on them."""
    error_NO = z_NK @ sae.W_dec + sae.b_dec - target_NO.to(sae.W_dec.dtype) * sae.output_scale
    reconstruction = error_NO.square().mean()
    is_active_NK = z_NK.detach() > 0
    lowest = torch.where(is_active_NK, z_NK.detach(), float("inf")).amin()
    zero = torch.zeros_like(reconstruction.detach())
    return SAEStep(reconstruction + penalty, reconstruction.detach(), penalty.detach(), zero, is_active_NK.sum(dim=0), lowest)
