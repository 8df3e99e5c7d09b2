"""Codes of the last few tokens where tokens are vectors of features: a frame for routing that does not move."""

import torch
from torch import Tensor

from trix.nn.fixed_code import FixedCode
from trix.outputs import StateSpec
from trix.routing.balance import summed_over_processes
from trix.routing.facts import Fact, Facts


class FeatureCode(FixedCode, Facts):
    """A :class:`~trix.nn.fixed_code.FixedCode` of features: r[t] = (x[t] - mean) P, P the table, one row for each feature.

    The mean is that of the tokens of the first training batch, of all processes together, and stays as it is from then on;
    before that it is 0. Without it codes are nearly parallel where features are not spread around 0, and signatures that are
    drawn at random send most tokens to few tiles.

    Missing tokens count as the mean. Features are not scaled: those in larger units weigh more.

    Attributes:
        mean_F: float [F]; a fact (:class:`~trix.routing.facts.Facts`), in the state_dict. num_centred: 1 once there is a mean,
            else 0; likewise.

    Shape:
        x: x_BTF, float, F = num_features.

    Source: the mean from a first batch is data-dependent initialisation, Salimans and Kingma, 2016 (arXiv:1602.07868), section
    3; theirs sets weights that go on learning.
    """

    size_name = "num_features"
    mean_F = Fact[Tensor]()
    num_centred = Fact[int]()

    def __init__(self, num_features: int, d_model: int, num_tokens: int = 2, decay: float = 0.8) -> None:
        super().__init__(num_features, d_model, num_tokens, decay)
        self.hold("mean_F", torch.zeros_like(self.table_VD[:, 0]))
        self.hold("num_centred", 0)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """The differences of the last J - 1 tokens from the mean; 0 where there was no token."""
        shape = ("batch", self.num_tokens - 1, len(self.table_VD))
        return (StateSpec("features", shape),) if self.num_tokens > 1 else ()

    @property
    def state_dtype(self) -> torch.dtype:
        """That of the table."""
        return self.table_VD.dtype

    def _masked(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        x_BTF = x.to(self.table_VD.dtype)
        if self.training and not self.num_centred:
            self._centre(x_BTF, mask_BT)
        x_BTF = x_BTF - self.mean_F
        return x_BTF if mask_BT is None else x_BTF.masked_fill(~mask_BT.unsqueeze(-1), 0)

    def _embed(self, token: Tensor, row_VD: Tensor) -> Tensor:
        return token @ row_VD

    @torch.no_grad()
    def _centre(self, x_BTF: Tensor, mask_BT: Tensor | None) -> None:
        is_there_BT = torch.ones_like(x_BTF[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT
        x_BTF = x_BTF.masked_fill(~is_there_BT.unsqueeze(-1), 0)
        total = torch.cat([x_BTF.sum(dim=(0, 1)), is_there_BT.sum().to(x_BTF).reshape(1)])
        summed_over_processes(total)
        self.mean_F = total[:-1] / total[-1].clamp_min(1)
        self.num_centred = 1
