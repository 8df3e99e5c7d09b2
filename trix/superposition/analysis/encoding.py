"""What analysis and merging ask of a sparse autoencoder, and its latents batch by batch.

Legend: N tokens, D width, K latents.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class SparseCoder(Protocol):
    """An ``nn.Module`` whose ``encode`` maps [N, d_model] to float32 [N, k] >= 0."""

    training: bool

    @property
    def d_model(self) -> int: ...
    @property
    def k(self) -> int: ...
    def encode(self, x_ND: Tensor, /) -> Tensor: ...
    def to(self, device: Any, /) -> Any: ...
    def train(self, mode: bool = True, /) -> Any: ...


def encoded_batches(sae: SparseCoder, batches: Iterable[Tensor], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_ND, z_NK) of each batch, float32 on the device, without gradients.

    The autoencoder moves to the device and encodes in evaluation mode; afterwards it is in the mode that it was in.

    Raises:
        ValueError: a batch of another width than the autoencoder's, or latents that are not finite.
    """
    was_training = sae.training
    sae.to(device)
    try:
        for batch in batches:
            if batch.ndim != 2 or batch.shape[1] != sae.d_model:
                raise ValueError(f"activations {tuple(batch.shape)} must be [N, d_model ({sae.d_model})]")
            sae.train(False)  # at every batch: whoever takes them may train in between
            x_ND = batch.to(device, torch.float32)
            with torch.no_grad():
                z_NK = sae.encode(x_ND).float()
            if len(z_NK) and not torch.isfinite(z_NK.amax()):  # NaN wins over any number, and latents are >= 0
                raise ValueError("latents must be finite: the activations or the weights hold NaN or infinity")
            yield x_ND, z_NK
    finally:
        sae.train(was_training)
