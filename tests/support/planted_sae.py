"""A small autoencoder with the attributes that all of trix.superposition relies on, and shards of activations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class ReLUSAE(nn.Module):
    """z = relu(x W_enc + b_enc), x_hat = z W_dec + b_dec."""

    def __init__(self, W_enc_DK: Tensor, W_dec_KD: Tensor, b_enc_K: Tensor | None = None) -> None:
        super().__init__()
        self.d_model, self.k = W_enc_DK.shape
        self.W_enc = nn.Parameter(W_enc_DK.clone())
        self.b_enc = nn.Parameter(torch.zeros(self.k) if b_enc_K is None else b_enc_K.clone())
        self.W_dec = nn.Parameter(W_dec_KD.clone())
        self.b_dec = nn.Parameter(torch.zeros(self.d_model))

    def encode(self, x_ND: Tensor) -> Tensor:
        return torch.relu(x_ND @ self.W_enc + self.b_enc)

    def decode(self, z_NK: Tensor) -> Tensor:
        return z_NK @ self.W_dec + self.b_dec

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        z_NK = self.encode(x_ND)
        return self.decode(z_NK), z_NK


def identity_sae(num_latents: int) -> ReLUSAE:
    """Latent k is relu(x_k)."""
    return ReLUSAE(torch.eye(num_latents), torch.eye(num_latents))


def write_shards(
    folder: Path,
    acts_ND: Tensor,
    sizes: Sequence[int],
    tokids_N: Tensor | None = None,
    titleidx_N: Tensor | None = None,
    **others_N: Tensor,
) -> list[Path]:
    """Shards of the given numbers of tokens. Without other columns each token has its own id, and all are of document 0."""
    tokids_N = torch.arange(len(acts_ND)) if tokids_N is None else tokids_N
    titleidx_N = torch.zeros(len(acts_ND), dtype=torch.int64) if titleidx_N is None else titleidx_N
    columns = {"acts": acts_ND, "tokids": tokids_N, "titleidx": titleidx_N, **others_N}
    paths, start = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"shard_{number:05d}.safetensors"
        rows = slice(start, start + size)
        save_file({name: column[rows].contiguous() for name, column in columns.items()}, path)
        paths.append(path)
        start += size
    return paths
