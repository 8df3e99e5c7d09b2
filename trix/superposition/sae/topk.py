"""Autoencoders in which each token has the same number of active latents (arXiv:2406.04093)."""

from typing import Any

import torch
from torch import Tensor

from trix.superposition.sae.base import SAE, SAEStep, check_int
from trix.superposition.sae.sparse_code import SparseCode, sparse_decode, sparse_encode, top_entries


class TopKSAE(SAE):
    """z holds the ``active`` largest pre-activations of each token; those below 0 count as 0.

    Args:
        active: active latents per token. aux_k: dead latents that help to explain what is left, by default d_model / 2.

    Raises:
        ValueError: active or aux_k out of [1, k] or [0, k], and as :class:`SAE`.
    """

    architecture = "topk"
    fixes_active = True

    def __init__(self, d_model: int, k: int, *, active: int = 32, aux_k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, k, **settings)
        self.active = checked_active(active, k)
        self.aux_k = default_aux_k(aux_k, d_model, k)

    def settings(self) -> dict[str, Any]:
        return {"active": self.active, "aux_k": self.aux_k, "dead_window": self.dead_window}

    def code(self, x_ND: Tensor) -> SparseCode:
        return sparse_encode(self.scaled(x_ND), self.W_enc, self.b_enc, self.centre, top_entries(self.active))

    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        return step_of_code(self, self.code(x_ND), x_ND, target_NO, self.aux_k)


def step_of_code(sae: SAE, code: SparseCode, x_ND: Tensor, target_NO: Tensor, aux_k: int) -> SAEStep:
    """Reconstruction from a sparse code, and the dead latents' part."""
    error_NO = target_NO.to(sae.W_dec.dtype) * sae.output_scale - sae.b_dec - sparse_decode(code, sae.W_dec)
    reconstruction = error_NO.square().mean()
    aux = sae.dead_latents_loss(sae.scaled(x_ND), error_NO, aux_k)
    return SAEStep(
        reconstruction + aux, reconstruction.detach(), torch.zeros_like(aux), aux.detach(), fired(code, sae.k), lowest(code)
    )


def fired(code: SparseCode, k: int) -> Tensor:
    """int64 [K]: tokens in which each latent is above 0."""
    return torch.bincount(code.latent_M[code.value_M > 0], minlength=k)


def lowest(code: SparseCode) -> Tensor:
    """The smallest value above 0; inf without one."""
    value_M = code.value_M.detach()
    infinite = value_M.new_full((1,), float("inf"))
    return torch.cat([value_M.masked_fill(value_M <= 0, float("inf")), infinite]).min()


def checked_active(active: int, k: int) -> int:
    """active, where it is an int in [1, k].

    Raises:
        ValueError: it is not.
    """
    check_int("active", active)
    if not 1 <= active <= k:
        raise ValueError(f"active ({active}) must be >= 1 and <= k ({k})")
    return active


def default_aux_k(aux_k: int | None, d_model: int, k: int) -> int:
    """aux_k, by default d_model / 2 but at most k.

    Raises:
        ValueError: it is no int in [0, k].
    """
    aux_k = min(d_model // 2, k) if aux_k is None else aux_k
    check_int("aux_k", aux_k)
    if not 0 <= aux_k <= k:
        raise ValueError(f"aux_k ({aux_k}) must be >= 0 and <= k ({k})")
    return aux_k
