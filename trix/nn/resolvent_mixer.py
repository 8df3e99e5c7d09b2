"""Mixing by the resolvent of a tridiagonal operator, with hops to the left only, or both ways."""

import math
from functools import reduce
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional.phase import resolvent_phase
from trix.functional.resolvent import Pair, check_choice, open_left_end, resolvent_pivots
from trix.nn.recurrent_mixer import Hops, RecurrentMixer, softplus_spread
from trix.outputs import State, StateSpec

Hopping = Literal["hermitian", "one_way"]
ETA_MIN = 1e-3  # the error of float32 pivots is about 1e-7 / eta
ENERGY_SCALE = 0.5  # of v where hermitian training starts: a rough potential shortens the memory (Anderson localisation)
BAND = (0.15, 0.85)  # of the heads' wave numbers, in units of pi: inside the band, off its edges
ETA_START = (0.01, 0.5)  # of the heads' eta, from long memory to short


def check_causal_mode(mode: object) -> None:
    """Raise ValueError for another mode than "causal": every entry of the two-sided resolvent depends on every token."""
    if mode != "causal":
        raise ValueError(
            f"mode ({mode!r}) must be 'causal': a causal model takes no two-sided resolvent, which sees later tokens"
        )


class ResolventMixer(RecurrentMixer):
    """Tokens learn of each other by the last row of a resolvent: L_ij = [(H_i - z)^-1]_ij, H_i the leading block 0..i.

    H is tridiagonal, and each token's entries are read from it: alpha_i = v_i - lambda - i eta_i on the diagonal, and the hop
    c_i = softplus(.) e^(i theta) to the token before. With ``hopping="one_way"``, the default, w = 0 and G = 1 / alpha with
    Im alpha = -(|c| + eta). With ``"hermitian"`` the operator also hops back: w = |c|^2 and G_i = 1 / (alpha_i - w_i G_{i-1}).
    Then |G_i| <= 1 / eta_i and, as u and y are each scaled by sqrt(eta), |y_i| <= (sum_{j<=i} |u_j|^2)^(1/2) at every token
    [theorem, vector state; the norm of a whole text may grow]. Hermitian hopping takes longer and predicts text no better, or
    worse [measured: ``CASE=bk_quality``]. Given G, both are Mamba-2's recurrence with complex decay -c_i G_{i-1}, which
    may exceed 1 at single tokens.

    Two gauges unwind the mean rotation of a head: theta = -arg(-G*), and the output is turned by -arg(G*). G* is the pivot of
    an endless row of equal tokens, with the dynamics' biases as their entries; a text begins at such a row's open end.

    A token's phase is arg of the sum over heads of eta G, in (0, pi). With one-way hopping G = 1 / alpha, so the phase depends
    on the token alone; with hermitian hopping it depends on the tokens before it, too.

    Args:
        hopping: see above. gauge: unwind the mean rotation. eta_min: added to every eta. mode: "causal" alone, see
            :func:`check_causal_mode`. All others: see :class:`~trix.nn.recurrent_mixer.RecurrentMixer`.

    Raises:
        ValueError: another hopping or mode, eta_min <= 0 or not finite, and as RecurrentMixer.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"phase"})

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        context_length: int | None = None,
        ternary: bool = False,
        dropout: float = 0.0,
        *,
        d_state: int = 16,
        conv_width: int = 4,
        expand: int = 1,
        hopping: Hopping = "one_way",
        gauge: bool = True,
        eta_min: float = ETA_MIN,
        mode: str = "causal",
    ) -> None:
        check_causal_mode(mode)
        if not 0 < eta_min < math.inf:
            raise ValueError(f"eta_min ({eta_min}) must be > 0 and finite")
        check_choice("hopping", hopping, get_args(Hopping))
        super().__init__(
            d_model,
            n_heads,
            context_length,
            ternary,
            dropout,
            d_state=d_state,
            conv_width=conv_width,
            expand=expand,
            num_dynamics=3,
        )
        self.hopping, self.gauge, self.eta_min = hopping, gauge, eta_min
        with torch.no_grad():
            energy, eta, hop = torch.split(self.dynamics.bias, self.n_heads)
            wave_number = torch.linspace(BAND[0], BAND[1], self.n_heads) * math.pi
            energy.copy_(-2 * wave_number.cos() if hopping == "hermitian" else torch.zeros(self.n_heads))
            eta.copy_(softplus_spread(ETA_START, self.n_heads))
            hop.fill_(math.log(math.e - 1))  # softplus of it is 1
            # Hops that vary turn the phase from token to token, and with one-way hopping so does the energy. Both therefore
            # start the same for all tokens; otherwise, what comes from far back has a random sign and recall is hardly learned.
            self.dynamics.weight[: self.n_heads] *= ENERGY_SCALE if hopping == "hermitian" else 0.0
            self.dynamics.weight[2 * self.n_heads :] = 0.0

    def hop_specs(self) -> tuple[StateSpec, ...]:
        """The last pivot, less G*: zeros are the open end. One-way hopping needs none."""
        return (StateSpec("pivot", ("batch", self.n_heads, 2)),) if self.hopping == "hermitian" else ()

    def hops(self, dynamics_BHT: tuple[Tensor, ...], is_token_B1T: Tensor | None, state: State) -> Hops:
        alpha, eta, hop = self._operator(*dynamics_BHT)
        mean_alpha, _, mean_hop = self.mean_operator(hop.dtype)
        is_hermitian = self.hopping == "hermitian"
        end = open_left_end(mean_alpha, mean_hop.square() if is_hermitian else torch.zeros_like(mean_hop))
        if is_token_B1T is not None:
            hop = hop * is_token_B1T
            alpha = _where(is_token_B1T, alpha, end)
        kept: State = ()
        if not is_hermitian:
            G = resolvent_pivots(alpha, None)
        else:
            end_H2 = torch.stack(end, dim=-1)
            first_BH2 = state[0].to(eta.dtype) + end_H2 if state else end_H2.expand(eta.shape[0], -1, -1)
            G = resolvent_pivots(alpha, hop.square(), Pair(*first_BH2.unbind(-1)))
            kept = (torch.stack([part[..., -1] for part in G], dim=-1) - end_H2,)
        scale = eta.sqrt()
        if not self.gauge:
            return Hops(G, Pair(hop, torch.zeros_like(hop)), scale, scale, None, kept)
        modulus = (end.re.square() + end.im.square()).sqrt()
        cos, sin = (end.re / modulus)[:, None], (end.im / modulus)[:, None]
        return Hops(G, Pair(hop * -cos, hop * sin), scale, scale, Pair(cos[..., None], -sin[..., None]), kept)

    def mean_operator(self, dtype: torch.dtype | None = None) -> tuple[Pair, Tensor, Tensor]:
        """alpha, eta and |c| of each head where the dynamics are their biases, [H]."""
        bias = self.dynamics.bias if dtype is None else self.dynamics.bias.to(dtype)
        return self._operator(*torch.split(bias, self.n_heads))

    def _operator(self, energy: Tensor, eta: Tensor, hop: Tensor) -> tuple[Pair, Tensor, Tensor]:
        """alpha, eta and |c| of these dynamics."""
        eta, hop = F.softplus(eta) + self.eta_min, F.softplus(hop)
        return Pair(energy, -eta if self.hopping == "hermitian" else -(eta + hop)), eta, hop

    def phase(self, hops: Hops) -> Tensor:
        """The phase of sum_h eta_h G_h, which is in the upper half-plane as each G_h is."""
        weight = hops.scale_in.square()
        re, im = (reduce(torch.add, (weight * part).unbind(1)) for part in hops.G)  # in this order wherever a token stands
        return resolvent_phase(Pair(re, im))


def _where(is_token_B1T: Tensor, alpha: Pair, end: Pair) -> Pair:
    """alpha, and at padding 1 / end, which has the pivot end: what follows padding begins at an open end."""
    square = end.re.square() + end.im.square()
    return Pair(
        torch.where(is_token_B1T, alpha.re, (end.re / square)[:, None]),
        torch.where(is_token_B1T, alpha.im, (-end.im / square)[:, None]),
    )
