"""What decoder rows say without any text: the tokens whose logits they raise and lower, and the rows that are like them.

Legend: K latents, M of them, O width of the decoder, V vocabulary, A tokens or neighbours kept, H bins of a histogram.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_BINS = 40
BATCH_DIRECTIONS = 64  # at a time: of a vocabulary of 50000, 13 MB of logits


class DirectionLogits(NamedTuple):
    """Logits of M directions.

    top_MA, bottom_MA: int64, the tokens with the largest and smallest logits, the largest or smallest first; top_value_MA and
    bottom_value_MA: these logits, float32. count_MH: int64, all logits in LOGIT_BINS equal bins from the smallest to the
    largest one of the direction.
    """

    top_MA: Tensor
    top_value_MA: Tensor
    bottom_MA: Tensor
    bottom_value_MA: Tensor
    count_MH: Tensor


@torch.no_grad()
def direction_logits(
    row_MO: Tensor, unembed: Callable[[Tensor], Tensor], vocab_size: int, num_kept: int = 10
) -> DirectionLogits:
    """Direct logit attribution of directions d in the residual stream,

        logits(d) = unembed(d / rms(d)) - unembed(0),  rms(d) = the root of the mean of d^2.

    It is what the final norm and the head make of a stream that holds d and nothing else, less what they make of an empty one,
    so that biases do not count. The norm makes it independent of the length of d. A direction of zeros has logits of 0. What
    later blocks would make of d is not in it.

    Args:
        row_MO: float. unembed: maps streams [N, O] to logits [N, V or more], as
            :meth:`~trix.superposition.backends.CausalLMBackend.unembed`. vocab_size: V, logits beyond which are left out.
        num_kept: A, at most V.

    Raises:
        ValueError: logits that are fewer than vocab_size or not finite.
    """
    rms_M1 = row_MO.float().square().mean(dim=-1, keepdim=True).sqrt()
    unit_MO = torch.where(rms_M1 > 0, row_MO.float() / rms_M1, 0.0)
    empty_1V = unembed(torch.zeros_like(unit_MO[:1]))[:, :vocab_size]
    if empty_1V.shape[-1] < vocab_size:
        raise ValueError(f"logits ({empty_1V.shape[-1]}) must be at least vocab_size ({vocab_size})")
    num_kept = min(num_kept, vocab_size)
    parts: list[tuple[Tensor, ...]] = []
    for unit in torch.split(unit_MO, BATCH_DIRECTIONS):
        logit_BV = unembed(unit)[:, :vocab_size] - empty_1V
        if not bool(logit_BV.isfinite().all()):
            raise ValueError("logits of decoder rows must be finite: the weights hold NaN or infinity")
        order_BV = logit_BV.sort(dim=-1, descending=True, stable=True)
        last = slice(vocab_size - num_kept, vocab_size)
        parts.append(
            (
                order_BV.indices[:, :num_kept],
                order_BV.values[:, :num_kept],
                order_BV.indices[:, last].flip(-1),
                order_BV.values[:, last].flip(-1),
                torch.stack([_histogram(logit_V) for logit_V in logit_BV]),
            )
        )
    return DirectionLogits(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _histogram(logit_V: Tensor) -> Tensor:
    low, high = logit_V.aminmax()
    bin_V = ((logit_V - low) / (high - low).clamp_min(torch.finfo(logit_V.dtype).tiny) * LOGIT_BINS).long()
    return torch.bincount(bin_V.clamp_(max=LOGIT_BINS - 1), minlength=LOGIT_BINS)


@torch.no_grad()
def nearest_rows(row_KO: Tensor, latents: Sequence[int], num_kept: int = 5) -> tuple[Tensor, Tensor]:
    """The rows with the largest cosines to those of M latents, without themselves: (idx_MA int64, cosine_MA float32).

    Args:
        row_KO: decoder, float. num_kept: A, at most K - 1.
    """
    unit_KO = F.normalize(row_KO.detach().float(), dim=-1)
    latent_M = torch.tensor(latents, dtype=torch.int64, device=unit_KO.device)
    num_kept = min(num_kept, len(unit_KO) - 1)
    parts = []
    for latent_B in torch.split(latent_M, BATCH_DIRECTIONS):
        cosine_BK = unit_KO[latent_B] @ unit_KO.t()
        cosine_BK.scatter_(1, latent_B[:, None], -torch.inf)
        parts.append(cosine_BK.topk(num_kept, dim=-1))
    return torch.cat([part.indices for part in parts]).cpu(), torch.cat([part.values for part in parts]).cpu()
