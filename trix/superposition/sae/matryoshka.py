"""Autoencoders whose first latents must explain the activations by themselves, too (arXiv:2503.17547)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trix.superposition.sae.base import SAEStep
from trix.superposition.sae.batch_topk import BatchTopKSAE, chosen
from trix.superposition.sae.sparse_code import sparse_decode
from trix.superposition.sae.topk import fired, lowest


class MatryoshkaSAE(BatchTopKSAE):
    """The loss is the mean over the prefixes: each, with the latents before its end alone, reconstructs the activations.

    So general features come first, and a special one further back cannot hollow them out.

    Args:
        prefixes: ends of the prefixes, rising, the last one k; by default k/8, k/4, k/2 and k.

    Raises:
        ValueError: prefixes that do not rise from >= 1 to k, and as :class:`BatchTopKSAE`.
    """

    architecture = "matryoshka"

    def __init__(self, d_model: int, k: int, *, prefixes: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(d_model, k, **settings)
        ends = sorted({max(k // part, 1) for part in (8, 4, 2, 1)}) if prefixes is None else list(prefixes)
        if not ends or ends[0] < 1 or ends[-1] != k or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"prefixes ({ends}) must rise from >= 1 to k ({k})")
        self.prefixes = tuple(ends)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prefixes": list(self.prefixes)}

    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        code = self.training_code(x_ND)
        error_NO = target_NO.to(self.W_dec.dtype) * self.output_scale - self.b_dec
        losses, start = [], 0
        for end in self.prefixes:
            of_part = (code.latent_M >= start) & (code.latent_M < end)
            error_NO = error_NO - sparse_decode(chosen(code, of_part.nonzero().flatten()), self.W_dec)
            losses.append(error_NO.square().mean())
            start = end
        aux = self.dead_latents_loss(self.scaled(x_ND), error_NO, self.aux_k)
        loss = torch.stack(losses).mean() + aux
        return SAEStep(loss, losses[-1].detach(), torch.zeros_like(aux), aux.detach(), fired(code, self.k), lowest(code))
