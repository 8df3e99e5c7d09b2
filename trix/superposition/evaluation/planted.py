"""Synthetic activations whose features are known, so that what an autoencoder finds can be compared with what is there.

Shapes: N tokens, D width, F planted features, R features without a parent.
"""

from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trix.superposition.config import Settings

GROUP = 8  # features that occur together
RANK_SHIFT = 10  # of Zipf's law: frequencies of the first ten ranks are alike
FEATURES_PER_PARENT = 32
MAX_SIZE = 2**20  # of the features, and of the width
DIRECTIONS, TRAINING, EVALUATION, WEIGHTS, RANDOM_ROWS = range(5)  # streams of random numbers


class PlantedConfig(Settings):
    """Features in superposition, as activations of a language model are thought to hold them.

    Args:
        width: D. num_features: F; more than the width puts the features in superposition.
        mean_active: features that fire in a token, on average.
        zipf: exponent of the frequencies. The feature of rank r, among those without a parent, fires in a share of the tokens
            proportional to (r + 10)^-zipf.
        correlation: between the hidden Gaussians that decide which features fire, in groups of eight features of neighbouring
            ranks; 0 makes them independent.
        parents: features that have children, by default one in 32; they are the most frequent ones, as general features are.
            children: those of a parent. child_share: share of a parent's tokens in which one of its children fires; a child
            never fires without its parent.
        strength_spread: standard deviation of the logarithm of a feature's strength where it fires; the median is 1.
        noise: root mean square norm of the Gaussian noise. offset: norm of what is added to all tokens.

    Raises:
        ValueError: more features in hierarchies than there are, or a feature that would fire in more than all tokens.
    """

    width: int = Field(default=128, ge=1, le=MAX_SIZE)
    num_features: int = Field(default=512, ge=1, le=MAX_SIZE)
    mean_active: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    zipf: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    correlation: float = Field(default=0.2, ge=0, lt=1)
    parents: int | None = Field(default=None, ge=0)
    children: int = Field(default=4, ge=1)
    child_share: float = Field(default=0.8, gt=0, le=1)
    strength_spread: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    noise: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    offset: float = Field(default=3.0, ge=0, allow_inf_nan=False)

    @property
    def num_parents(self) -> int:
        return self.num_features // FEATURES_PER_PARENT if self.parents is None else self.parents

    @property
    def num_roots(self) -> int:
        """R, the number of features without a parent."""
        return self.num_features - self.num_parents * self.children

    def frequencies(self) -> Tensor:
        """Share of the tokens in which each feature fires, float64 [F]: those without a parent by rank, then the children."""
        weight_R = (torch.arange(1, self.num_roots + 1, dtype=torch.float64) + RANK_SHIFT) ** -self.zipf
        total = weight_R.sum() + self.child_share * weight_R[: self.num_parents].sum()
        root_R = weight_R * (self.mean_active / total)
        child_P = root_R[: self.num_parents] * (self.child_share / self.children)
        return torch.cat([root_R, child_P.repeat_interleave(self.children)])

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.num_roots < max(self.num_parents, 1):
            wanted = self.num_parents * (1 + self.children)
            raise ValueError(f"parents and their children ({wanted}) must be <= num_features ({self.num_features})")
        highest = float(self.frequencies()[0])
        if not highest <= 1:
            raise ValueError(
                f"frequency of the first feature ({highest:.3g}) must be <= 1: mean_active ({self.mean_active:g}) is too large "
                f"for num_features ({self.num_features})"
            )
        return self


class PlantedTokens(NamedTuple):
    """x_ND: activations, float32. strength_NF: how strongly each feature fires in each token, float32; 0 where it does not."""

    x_ND: Tensor
    strength_NF: Tensor


class PlantedActivations:
    """Activations x = sum_f strength_f direction_f + offset + noise.

    Attributes:
        direction_FD: random unit vectors, float32. frequency_F: float64. parent_F: int64, the parent of a child, -1 for the
            others. offset_D: float32.

    Everything is drawn from the seed; directions, training tokens and evaluation tokens from streams of their own.
    """

    def __init__(self, config: PlantedConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        generator = self.generator(DIRECTIONS)
        shape = (config.num_features, config.width)
        self.direction_FD = nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
        self.offset_D = config.offset * nn.functional.normalize(torch.randn(config.width, generator=generator), dim=0)
        self.frequency_F = config.frequencies()
        parent_C = torch.arange(config.num_parents).repeat_interleave(config.children)
        self.parent_F = torch.cat([torch.full((config.num_roots,), -1), parent_C])

    def generator(self, stream: int) -> torch.Generator:
        """A generator at the start of one of the streams, such as TRAINING or EVALUATION."""
        return torch.Generator().manual_seed(stream_seed(self.seed, stream))

    def sample(self, num_tokens: int, generator: torch.Generator) -> PlantedTokens:
        """Draw tokens, the next ones of the generator's stream."""
        config, parents = self.config, self.config.num_parents
        fires_NF = self._root_fires(num_tokens, generator)
        if parents:
            has_child_NP = torch.rand(num_tokens, parents, generator=generator) < config.child_share
            which_NP = torch.randint(config.children, (num_tokens, parents), generator=generator)
            chosen_NPC = nn.functional.one_hot(which_NP, config.children).bool()
            child_NPC = chosen_NPC & (fires_NF[:, :parents] & has_child_NP).unsqueeze(-1)
            fires_NF = torch.cat([fires_NF, child_NPC.flatten(1)], dim=1)
        strength_M = (config.strength_spread * torch.randn(int(fires_NF.sum()), generator=generator)).exp()
        strength_NF = torch.zeros(fires_NF.shape).masked_scatter(fires_NF, strength_M)
        noise_ND = torch.randn(num_tokens, config.width, generator=generator) * (config.noise / config.width**0.5)
        return PlantedTokens(strength_NF @ self.direction_FD + self.offset_D + noise_ND, strength_NF)

    def _root_fires(self, num_tokens: int, generator: torch.Generator) -> Tensor:
        """bool [N, R], by a Gaussian copula: feature f fires where its Gaussian is below the quantile of its frequency."""
        config = self.config
        quantile_R = torch.special.ndtri(self.frequency_F[: config.num_roots]).float()
        gauss_NR = torch.randn(num_tokens, config.num_roots, generator=generator)
        if config.correlation:
            group_NG = torch.randn(num_tokens, -(-config.num_roots // GROUP), generator=generator)
            shared_NR = group_NG.repeat_interleave(GROUP, dim=1)[:, : config.num_roots]
            gauss_NR = (1 - config.correlation) ** 0.5 * gauss_NR + config.correlation**0.5 * shared_NR
        return gauss_NR < quantile_R


def stream_seed(seed: int, stream: int) -> int:
    """A seed for one of several independent streams: equal ones would start autoencoders at the planted directions."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0])
