"""Features that decide which tile a token goes to, others that do not, and an autoencoder that finds each of them."""

import numpy as np
import torch
from planted_sae import ReLUSAE
from scipy import sparse
from torch import Tensor

from trix.nn import TriXFFN
from trix.superposition.tiles import Traffic, best_tiles

WIDTH, NUM_TILES, NUM_FEATURES = 64, 8, 24
NUM_DOCUMENTS, LENGTH = 80, 40


def planted_layer() -> TriXFFN:
    """Eight tiles, whose signatures are the first eight of 24 directions at right angles."""
    torch.manual_seed(0)
    layer = TriXFFN(WIDTH, NUM_TILES, NUM_TILES * 16, routing="explicit", balance_rate=0.0).eval()
    for tile in range(NUM_TILES):
        layer.insert_signature(tile, hadamard()[tile], tag="planted")
    return layer


def hadamard() -> Tensor:
    """Rows of +1 and -1 at right angles, [63, 64], each with 32 of both."""
    H = torch.ones(1, 1)
    while len(H) < WIDTH:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H[1:]


class JumpSAE(ReLUSAE):
    """Latents below 0.3 are 0; those above keep all of their size."""

    def encode(self, x_ND: Tensor) -> Tensor:
        z_NK = super().encode(x_ND)
        return z_NK * (z_NK > 0.3)


def planted_sae() -> ReLUSAE:
    """Latent f is how much of feature f there is."""
    unit_FD = hadamard()[:NUM_FEATURES] / WIDTH**0.5
    return JumpSAE(unit_FD.T, unit_FD)


def planted_activations(seed: int = 0, length: int = LENGTH) -> Tensor:
    """[N, D]: each token has one of the features that decide, of size 2 to 3, four others as large, and noise."""
    draw = torch.Generator().manual_seed(seed)
    num_tokens = NUM_DOCUMENTS * length
    size_NF = torch.zeros(num_tokens, NUM_FEATURES)
    decides_N = torch.randint(0, NUM_TILES, (num_tokens,), generator=draw)
    size_NF[torch.arange(num_tokens), decides_N] = 2 + torch.rand(num_tokens, generator=draw)
    other_NF = torch.rand(num_tokens, NUM_FEATURES - NUM_TILES, generator=draw)
    top_N4 = other_NF.topk(4, dim=1).indices + NUM_TILES
    size_NF.scatter_(1, top_N4, 2 + torch.rand(num_tokens, 4, generator=draw))
    noise_ND = 0.02 * torch.randn(num_tokens, WIDTH, generator=draw)
    return size_NF @ (hadamard()[:NUM_FEATURES] / WIDTH**0.5) + noise_ND


def planted_traffic(seed: int = 0, length: int = LENGTH) -> Traffic:
    """The tokens of documents of equal length with the tiles of the planted layer; token ids say nothing."""
    x_ND = planted_activations(seed, length)
    draw = np.random.default_rng(seed)
    return Traffic(
        x_ND,
        sparse.csr_matrix(planted_sae().encode(x_ND).detach().numpy()),
        best_tiles(planted_layer(), x_ND),
        draw.integers(0, 30, size=len(x_ND)),
        np.repeat(np.arange(NUM_DOCUMENTS), length),
        np.tile(np.arange(length), NUM_DOCUMENTS),
        NUM_TILES,
    )
