"""How well a sparse autoencoder reconstructs activations, and how its latents are used.

Shapes: N tokens, D width of the activations, K latents.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from trix.superposition.sae import SAE

DENSE_SHARE = 0.1  # of the tokens; a latent that is active in more of them says little
FREQUENT_SHARE = 0.01
ROWS = 1024  # of the decoder, compared with all at once


class ReconstructionMetric(Metric):
    """Measures over all tokens, in float64, reduced over processes.

    explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, nan where all activations are equal. reconstruction: mean
    square of x - x_hat over that of x. mse: mean of (x - x_hat)^2 over tokens and dimensions. cosine and l2_ratio: means over
    tokens of the cosine of x and x_hat and of |x_hat| / |x|; a token of norm 0 counts as 0. gamma: |mean| / |std| of the
    activations, both vectors of width D; the larger it is, the more latents die (arXiv:2605.31518).

    active: latents above 0 per token. dead: share of the latents that are active in no token. frequent, dense: share of those
    that are active in more than FREQUENT_SHARE, DENSE_SHARE of the tokens.

    Source: the core list of SAEBench, arXiv:2503.09532.

    Args:
        width: of the activations. k: number of latents.
    """

    full_state_update = False

    num_tokens: Tensor
    sum_D: Tensor
    square: Tensor
    squared_error: Tensor
    cosine: Tensor
    l2_ratio: Tensor
    num_fired_K: Tensor

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        for name, shape in {
            "num_tokens": (),
            "sum_D": (width,),
            "square": (),
            "squared_error": (),
            "cosine": (),
            "l2_ratio": (),
            "num_fired_K": (k,),
        }.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat_ND: Tensor, x_ND: Tensor, z_NK: Tensor) -> None:
        """Take tokens into account: their reconstruction, the activations, and the latents."""
        x_ND, x_hat_ND = x_ND.double(), x_hat_ND.double()
        norm_N, norm_hat_N = x_ND.norm(dim=-1), x_hat_ND.norm(dim=-1)
        self.num_tokens += len(x_ND)
        self.sum_D += x_ND.sum(dim=0)
        self.square += x_ND.square().sum()
        self.squared_error += (x_ND - x_hat_ND).square().sum()
        self.cosine += _share((x_ND * x_hat_ND).sum(dim=-1), norm_N * norm_hat_N).sum()
        self.l2_ratio += _share(norm_hat_N, norm_N).sum()
        self.num_fired_K += (z_NK > 0).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        around_mean = self.square - self.sum_D.square().sum() / self.num_tokens
        share_K = self.density_K
        return {
            "explained_variance": 1 - self.squared_error / around_mean,
            "reconstruction": self.squared_error / self.square,
            "mse": self.squared_error / (self.num_tokens * len(self.sum_D)),
            "cosine": self.cosine / self.num_tokens,
            "l2_ratio": self.l2_ratio / self.num_tokens,
            "gamma": self.sum_D.norm() / (self.num_tokens * around_mean.clamp_min(0)).sqrt(),
            "active": share_K.sum(),
            "dead": (share_K == 0).double().mean(),
            "frequent": (share_K > FREQUENT_SHARE).double().mean(),
            "dense": (share_K > DENSE_SHARE).double().mean(),
        }

    @property
    def density_K(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Share of the tokens in which each latent is active, float64 [K]."""
        return self.num_fired_K / self.num_tokens


def max_decoder_cosine(sae: SAE) -> Tensor:
    """For each latent the largest cosine of its decoder row with another latent's, float64 [K]; nan for a single latent."""
    row_KO = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=-1)
    if len(row_KO) == 1:
        return torch.full((1,), float("nan"), dtype=torch.float64)
    largest: list[Tensor] = []
    for first in range(0, len(row_KO), ROWS):
        cosine_RK = row_KO[first : first + ROWS] @ row_KO.t()
        own_R = torch.arange(len(cosine_RK))
        cosine_RK[own_R, own_R + first] = -2.0
        largest.append(cosine_RK.amax(dim=-1))
    return torch.cat(largest)


def _share(part_N: Tensor, whole_N: Tensor) -> Tensor:
    """part / whole, 0 where the whole is."""
    return torch.where(whole_N > 0, part_N / whole_N, 0.0)
