"""Routing by scattering phase, with the interface of the research code: indices and weights straight from a resolvent.

Legend: B batch, N sequence, K chosen experts.
"""

import math
import warnings

import torch
from torch import Tensor, nn

from trix.functional.phase import nearest_tiles, place_score, resolvent_phase
from trix.functional.resolvent import Pair, log_prefix_determinant, resolvent_pivots


class ScatteringRouter(nn.Module):
    """Send each token to the K experts next to the phase of its resolvent; no parameters.

    u = num_experts * phase / pi; lo = clamp(round(u - K/2), 0, num_experts - K); experts lo, ..., lo + K - 1; weights
    softmax(-(u - (expert + 1/2))^2 / (2 * 0.75^2)). Layers of tiles use :class:`~trix.routing.ScatteringRouter`: the same rule,
    with edges that learn where the phases lie.

    Theorem: causal and the same for every batch row and prefix, if G is. A token's experts depend on its own G alone.
    Claimed and false: that the phase spreads the load by itself. With v ~ N(0, .02) and eta = 1, two experts of eight get all
    tokens (entropy of the load .33 of ln 8, measured); learned edges reach .99.
    With top_k = 1 the weight is 1, without a gradient.

    Args:
        num_experts: experts. top_k: experts per token.
        use_clark_measure: bins of equal mass under the spectral (Clark) measure Im G / pi d lambda of the end site of a free
            half line, instead of equal bins of phase. With lambda = -2 cos(phase) that measure is 2/pi sin^2(phase) d phase, so
            u = num_experts * (phase - sin(phase) cos(phase)) / pi: a fixed distribution function. Loads are equal (theorem)
            where energies are distributed by that measure.
        resonance_threshold: |D| below which :meth:`detect_resonances` says so.

    Shape:
        G_ii: float [B, N, 2] (real, imaginary) -> indices int64 [B, N, K], ascending; weights float [B, N, K], sum 1.

    A G with Im G <= 0 is the resolvent of nothing; its phase is taken modulo pi, with one warning per router.

    Raises:
        ValueError: num_experts < 1, top_k outside [1, num_experts], resonance_threshold <= 0; a G_ii of another shape, of no
            token, or of integers.
    """

    def __init__(
        self, num_experts: int, use_clark_measure: bool = False, *, top_k: int = 2, resonance_threshold: float = 0.1
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k ({top_k}) must be >= 1 and <= num_experts ({num_experts})")
        if not resonance_threshold > 0:
            raise ValueError(f"resonance_threshold ({resonance_threshold}) must be > 0")
        self.num_experts, self.use_clark_measure = num_experts, use_clark_measure
        self.top_k, self.resonance_threshold = top_k, resonance_threshold
        self._has_warned = False

    def forward(self, G_ii: Tensor) -> tuple[Tensor, Tensor]:
        phase_BN = self.compute_scattering_phase(G_ii)
        if self.use_clark_measure:
            phase_BN = phase_BN - phase_BN.sin() * phase_BN.cos()
        place_BN = phase_BN * (self.num_experts / math.pi)
        expert_idx_BNK = nearest_tiles(place_BN, self.num_experts, self.top_k)
        return expert_idx_BNK, place_score(place_BN, expert_idx_BNK).softmax(dim=-1)

    def compute_scattering_phase(self, G_ii: Tensor) -> Tensor:
        """arg G modulo pi, in radians from 0 to pi: [B, N].

        It is minus the argument of the pivot 1 / G, the factor with which this token multiplies the determinant of the text so
        far. Claimed and false: that it is the argument of det_2(I + K), which is a sum over the text, and minus the physical
        phase shift; see :meth:`compute_spectral_shift`.
        """
        G = _pair("G_ii", G_ii)
        if not self._has_warned and bool((G.im <= 0).any()):
            self._has_warned = True
            smallest = float(G.im.min())
            warnings.warn(f"Im G ({smallest:.3g}) should be > 0, as for every resolvent: phases are modulo pi", stacklevel=2)
        return resolvent_phase(G)

    def compute_spectral_shift(self, lambda_: Tensor | float, *, potential: Tensor | None = None, eta: float = 1e-3) -> Tensor:
        """xi_t(lambda) = 1/pi sum_{i <= t} (arg d_i - arg d0_i), d = 1/G with the potential and d0 without, on the lattice.

        Theorem (Birman-Krein; Krein's sign): as eta goes to 0, xi_t tends to N(H0_t < lambda) - N(H_t < lambda), the difference
        of the numbers of eigenvalues of the leading blocks. So the phase that the interface calls delta is minus the physical
        phase shift. Causal: xi_t depends on the potential up to t.

        Args:
            lambda_: energies, of any shape. potential: float32 or float64 [B, N], on the lattice with hopping 1.
            eta: height above the real axis.

        Returns:
            [*shape of lambda_, B, N], in the dtype of the potential: [B, N] for one energy.

        Raises:
            ValueError: no potential, for xi is no function of the energy alone; one that is not finite or of another shape or
                dtype; eta <= 0.
        """
        if potential is None:
            raise ValueError("potential (None) must be given: the spectral shift compares the operator with and without it")
        if potential.ndim != 2:
            raise ValueError(f"potential {tuple(potential.shape)} must be [batch, sequence]")
        if not eta > 0:
            raise ValueError(f"eta ({eta}) must be > 0")
        energy = torch.as_tensor(lambda_, dtype=potential.dtype, device=potential.device)[..., None, None]
        with_v = (potential - energy).contiguous()
        free = (torch.zeros_like(potential) - energy).contiguous()
        im, hopping = torch.full_like(with_v, -eta), torch.ones_like(with_v)
        G, G0 = (resolvent_pivots(Pair(re, im), hopping) for re in (with_v, free))
        return log_prefix_determinant(G, G0).im / math.pi

    def detect_resonances(self, D_eps: Tensor) -> Tensor:
        """Where |D| < resonance_threshold: bool [B, N]. Each token for itself: no quantile over the batch.

        Args:
            D_eps: a determinant of each prefix, such as :func:`~trix.resnet_bk.kernel.prefix_determinant`: complex [B, N], or
                float [B, N, 2] (real, imaginary).
        """
        if not D_eps.is_complex():
            D_eps = torch.complex(*_pair("D_eps", D_eps))
        return D_eps.abs() < self.resonance_threshold

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, use_clark_measure={self.use_clark_measure}, top_k={self.top_k}, "
            f"resonance_threshold={self.resonance_threshold}"
        )


def _pair(name: str, value: Tensor) -> Pair:
    if value.ndim != 3 or value.shape[-1] != 2 or value.shape[1] == 0 or not value.is_floating_point():
        raise ValueError(f"{name} {tuple(value.shape)} {value.dtype} must be float [batch, sequence >= 1, 2]")
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return Pair(*value.unbind(-1))
