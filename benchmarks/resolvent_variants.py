"""What was tried to bring hermitian hopping ahead of one-way hopping and SSD: a rotation per token, other first etas."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.resolvent import Pair
from trix.nn.recurrent_mixer import Hops, RecurrentMixer, softplus_spread
from trix.nn.resolvent_mixer import ResolventMixer
from trix.nn.ssd_mixer import SSDMixer
from trix.outputs import State

ROTATION_SCALE = 0.1  # factor on theta's weights at the start: with all angles at 0, SSD would start at a saddle point


class _Rotating(RecurrentMixer):
    """c_i is turned by e^(i theta_i), theta [B, H, T] a linear function of the token."""

    def __init__(self, d_model: int, n_heads: int, *args: Any, **settings: Any) -> None:
        super().__init__(d_model, n_heads, *args, **settings)
        self.rotation = nn.Linear(d_model, n_heads, bias=False)
        with torch.no_grad():
            self.rotation.weight *= ROTATION_SCALE

    def read_hops(self, x_BTD: Tensor, mask_BT: Tensor | None = None, state: State = ()) -> Hops:
        hops = super().read_hops(x_BTD, mask_BT, state)
        theta_BHT = F.linear(x_BTD.to(hops.c.re.dtype), self.rotation.weight.to(hops.c.re.dtype)).mT
        cos, sin = theta_BHT.cos(), theta_BHT.sin()
        return hops._replace(c=Pair(hops.c.re * cos - hops.c.im * sin, hops.c.re * sin + hops.c.im * cos))


class RotatingResolvent(_Rotating, ResolventMixer):
    """A resolvent with a phase per token on each hop, besides the gauge's phase per head. G does not change: w = |c|^2."""


class RotatingSSD(_Rotating, SSDMixer):
    """SSD with rotations. A gauge can remove an angle that is constant per head; only differences between tokens count."""


class EtaResolvent(ResolventMixer):
    """A resolvent whose heads start with eta from eta_start[0] to eta_start[1], logarithmically spaced; eta_min is added."""

    def __init__(self, d_model: int, n_heads: int, *args: Any, eta_start: tuple[float, float], **settings: Any) -> None:
        super().__init__(d_model, n_heads, *args, **settings)
        _, eta, _ = torch.split(self.dynamics.bias.detach(), n_heads)
        eta.copy_(softplus_spread(eta_start, n_heads))
