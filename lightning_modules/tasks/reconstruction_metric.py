"""How well a sparse autoencoder reconstructs all the activations of a stage, and which of its latents are used."""

import torch
from torch import Tensor
from torchmetrics import Metric

DENSE_SHARE = 0.1  # of the tokens; a latent that is active in more of them says little


class ReconstructionMetric(Metric):
    """explained_variance, reconstruction, active, dead and dense over all tokens, in float64, reduced over processes.

    explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, nan where all activations are equal. reconstruction: mean
    square of x - x_hat over that of x. active: latents above 0 per token. dead: share of the latents that are active in no
    token. dense: share of those that are active in more than DENSE_SHARE of the tokens.

    Args:
        width: of the activations. k: number of latents.
    """

    full_state_update = False

    num_tokens: Tensor
    sum_D: Tensor
    square: Tensor
    squared_error: Tensor
    num_fired_K: Tensor

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        for name, shape in {
            "num_tokens": (),
            "sum_D": (width,),
            "square": (),
            "squared_error": (),
            "num_fired_K": (k,),
        }.items():
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat_ND: Tensor, x_ND: Tensor, z_NK: Tensor) -> None:
        """Take tokens into account: their reconstruction, the activations, and the latents."""
        x_ND = x_ND.double()
        self.num_tokens += len(x_ND)
        self.sum_D += x_ND.sum(dim=0)
        self.square += x_ND.square().sum()
        self.squared_error += (x_ND - x_hat_ND.double()).square().sum()
        self.num_fired_K += (z_NK > 0).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        around_mean = self.square - self.sum_D.square().sum() / self.num_tokens
        share_K = self.num_fired_K / self.num_tokens
        return {
            "explained_variance": 1 - self.squared_error / around_mean,
            "reconstruction": self.squared_error / self.square,
            "active": share_K.sum(),
            "dead": (share_K == 0).double().mean(),
            "dense": (share_K > DENSE_SHARE).double().mean(),
        }

    @property
    def density_K(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Share of the tokens in which each latent is active, float64 [K]."""
        return self.num_fired_K / self.num_tokens
