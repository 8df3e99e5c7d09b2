"""Autoencoders with a fixed mean number of active latents, and one threshold after training (arXiv:2412.06410)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.superposition.sae.base import SAE, SAEStep, check_threshold
from trix.superposition.sae.sparse_code import SparseCode, entries_above, sparse_encode
from trix.superposition.sae.topk import checked_active, default_aux_k, step_of_code

DECAY = 0.95  # of the threshold's running mean
SLACK = 0.8  # of the threshold, above which a training batch first looks for its entries


class BatchTopKSAE(SAE):
    """In training z holds the N * active largest pre-activations of a batch of N tokens, those above 0.

    Afterwards it holds all that are above ``threshold``, the mean of the smallest value that was kept in a batch; the mean is a
    running one over about 20 batches, divided by the weight it has so far, so that it is right from the first batch on.

    Args:
        active: active latents per token, on average. aux_k: dead latents that help to explain what is left, by default
            d_model / 2.

    Raises:
        ValueError: as :class:`~trix.superposition.sae.topk.TopKSAE`.
    """

    architecture = "batch_topk"
    fixes_active = True

    threshold_sum: Tensor
    num_batches: Tensor

    def __init__(self, d_model: int, k: int, *, active: int = 32, aux_k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, k, **settings)
        self.active = checked_active(active, k)
        self.aux_k = default_aux_k(aux_k, d_model, k)
        self.register_buffer("threshold_sum", torch.zeros(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    @property
    def threshold(self) -> Tensor:
        """What a pre-activation must exceed after training; 0 before the first batch."""
        return self.threshold_sum / (1 - DECAY ** self.num_batches.clamp_min(1))

    def set_threshold(self, threshold_K: Tensor) -> None:
        """Take one threshold, float [K], as if it were that of all batches so far.

        Raises:
            ValueError: a threshold < 0, or thresholds that differ.
        """
        check_threshold(threshold_K)
        if bool((threshold_K != threshold_K[0]).any()):
            ends = f"{threshold_K.min():g} to {threshold_K.max():g}"
            raise ValueError(f"thresholds of {self.architecture} ({ends}) must all be equal")
        self.num_batches.fill_(1)
        self.threshold_sum.copy_(threshold_K[0] * (1 - DECAY))

    def settings(self) -> dict[str, Any]:
        return {"active": self.active, "aux_k": self.aux_k, "dead_window": self.dead_window}

    def code(self, x_ND: Tensor) -> SparseCode:
        return self._code_above(self.scaled(x_ND), self.threshold)

    def training_code(self, x_ND: Tensor) -> SparseCode:
        """The N * active largest pre-activations above 0 of these tokens."""
        num_wanted, x_ND = self.active * len(x_ND), self.scaled(x_ND)
        code = self._code_above(x_ND, SLACK * self.threshold)
        if len(code.value_M) < num_wanted and bool(self.num_batches > 0):  # too few: the others may be below
            code = self._code_above(x_ND, torch.zeros_like(self.threshold))
        return largest(code, num_wanted)

    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        return step_of_code(self, self.training_code(x_ND), x_ND, target_NO, self.aux_k)

    @torch.no_grad()
    def note(self, step: SAEStep, num_tokens: int) -> None:
        super().note(step, num_tokens)
        if bool(step.lowest.isfinite()):
            self.threshold_sum.mul_(DECAY).add_(step.lowest, alpha=1 - DECAY)
            self.num_batches.add_(1)

    def _code_above(self, x_ND: Tensor, threshold: Tensor) -> SparseCode:
        return sparse_encode(x_ND, self.W_enc, self.b_enc, self.centre, entries_above(threshold))


def largest(code: SparseCode, num: int) -> SparseCode:
    """The ``num`` largest entries of a code, or all; gradients reach their values."""
    if len(code.value_M) <= num:
        return code
    kept_m = code.value_M.detach().topk(num, sorted=False).indices.sort().values
    return chosen(code, kept_m)


def chosen(code: SparseCode, entry_m: Tensor) -> SparseCode:
    """These entries of a code, int64 in rising order."""
    num_tokens = len(code.offset_N1) - 1
    offset_N1 = F.pad(torch.bincount(code.tokens[entry_m], minlength=num_tokens).cumsum(0), (1, 0))
    return SparseCode(offset_N1, code.latent_M[entry_m], code.value_M[entry_m])
