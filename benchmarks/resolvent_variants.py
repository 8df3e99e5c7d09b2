"""What was tried to bring hermitian hopping ahead of one-way hopping and of SSD: rotations by token, and another eta."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.resolvent import Pair
from trix.nn.recurrent_mixer import Hops, RecurrentMixer
from trix.nn.resolvent_mixer import ResolventMixer
from trix.nn.ssd_mixer import SSDMixer
from trix.outputs import State

ROTATION_SCALE = 0.1  # of the weights of theta where training starts: all angles at 0 would be a saddle of SSD


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
    """A resolvent whose hops have a phase by token, besides the gauge's by head. It is no phase of G: |c| alone is in w."""


class RotatingSSD(_Rotating, SSDMixer):
    """SSD with rotations. A constant angle by head is what the gauge unwinds; what is left of it are angles by token."""


class EtaResolvent(ResolventMixer):
    """Heads whose eta start between these two, from long memory to short."""

    def __init__(self, d_model: int, n_heads: int, *args: Any, eta_start: tuple[float, float], **settings: Any) -> None:
        super().__init__(d_model, n_heads, *args, **settings)
        low, high = map(math.log10, eta_start)
        with torch.no_grad():
            self.dynamics.bias[n_heads : 2 * n_heads] = torch.logspace(low, high, n_heads).expm1().log()
