"""The mixers that are compared with resolvents, all in one language model, and made to have equally many parameters.

Legend: B batch, T tokens, D width, H heads, P channels of a head, C channels of a convolution, S tokens with those before.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import library_contestants
import resolvent_variants
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.resolvent import Pair
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.nn.attention import RotaryAttention
from trix.nn.recurrent_mixer import NORM_EPS, Hops, RecurrentMixer
from trix.outputs import State, StateSpec, TokenContext

CONV_WIDTH = 4  # that of the recurrent mixers
NUM_TILES, TOP_K = 8, 2
MAX_EXCESS = 0.01  # of the number of parameters


class ConvAttention(RotaryAttention):
    """Attention to x + conv(x), a convolution per channel over the last four tokens: what the recurrent mixers have."""

    def __init__(self, d_model: int, *args: Any, **settings: Any) -> None:
        super().__init__(d_model, *args, **settings)
        self.conv = nn.Conv1d(d_model, d_model, CONV_WIDTH, groups=d_model)

    def state_specs(self) -> tuple[StateSpec, ...]:
        return StateSpec("conv", ("batch", self.conv.in_channels, CONV_WIDTH - 1)), *super().state_specs()

    def forward(
        self, x_BTD: Tensor, context: TokenContext = TokenContext(), state: State | None = None
    ) -> tuple[Tensor, State, None]:
        x_BDT = x_BTD.mT
        x_BDS = F.pad(x_BDT, (CONV_WIDTH - 1, 0)) if state is None else torch.cat([state[0], x_BDT], dim=-1)
        mixed_BTD = (x_BDT + self.conv(x_BDS)).mT
        update_BTD, cache, _ = super().forward(mixed_BTD, context, None if state is None else state[1:])
        return update_BTD, () if state is None else (x_BDS[..., 1 - CONV_WIDTH :], *cache), None


class MinGRU(RecurrentMixer):
    """h_i = (1 - z_i) h_{i-1} + z_i g(u_i) per channel, z = sigmoid(W x), in the frame of the resolvent and SSD mixers.

    g(u) = u + 1/2 where u >= 0, else sigmoid(u). All is positive, so sums of logarithms do, with a = cumsum log(1 - z):
    h_i = exp(a_i + log sum_{j<=i} exp(log z_j + log g_j - a_j)).

    Source: Feng et al., 2024, Were RNNs All We Needed? (arXiv:2410.01201).
    """

    def __init__(self, d_model: int, n_heads: int, *args: Any, **settings: Any) -> None:
        super().__init__(d_model, n_heads, *args, **settings, d_state=0, num_dynamics=d_model // n_heads)

    def hop_specs(self) -> tuple[StateSpec, ...]:
        return ()

    def hops(self, dynamics_BHT: tuple[Tensor, ...], is_token_B1T: Tensor | None, state: State) -> Hops:
        """The logits of z, instead of scale_in: there is a decay for each channel, not for each head."""
        del state
        if is_token_B1T is not None:
            raise ValueError("mask_BT must be None")
        logit_BHTP, _, _ = self._split(torch.cat(dynamics_BHT, dim=1).transpose(1, 2))
        none = Pair(logit_BHTP, logit_BHTP)
        return Hops(none, none, logit_BHTP)

    def _recur(self, hops: Hops, channels_BTC: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        u_BHTP, _, _ = self._split(channels_BTC)
        logit_BHTP = hops.scale_in
        decay_BHTP = F.logsigmoid(-logit_BHTP).cumsum(dim=2)
        log_g_BHTP = torch.where(u_BHTP >= 0, (F.relu(u_BHTP) + 0.5).log(), F.logsigmoid(u_BHTP))
        term_BHTP = F.logsigmoid(logit_BHTP) + log_g_BHTP - decay_BHTP
        if carry is not None:
            term_BHTP = torch.cat([carry[..., 0].log().unsqueeze(2), term_BHTP], dim=2)
        sum_BHTP = term_BHTP.logcumsumexp(dim=2)[:, :, -channels_BTC.shape[1] :]
        h_BHTP = (decay_BHTP + sum_BHTP).exp()
        last = torch.stack([h_BHTP[:, :, -1], torch.zeros_like(h_BHTP[:, :, -1])], dim=-1)
        y_BHTP = h_BHTP + u_BHTP * self.skip[:, None, None]
        return F.rms_norm(y_BHTP, y_BHTP.shape[-1:], eps=NORM_EPS), last


class Size(NamedTuple):
    d_model: int
    num_layers: int
    n_heads: int
    context_length: int
    batch_size: int
    num_parameters: int


@dataclass(frozen=True)
class Contestant:
    """mixer, mixer_args, ffn: see LanguageModelConfig. is_hybrid: the block in the middle mixes by attention."""

    mixer: str = "resolvent"
    mixer_args: dict[str, Any] = field(default_factory=dict)
    is_hybrid: bool = False
    ffn: FFNConfig = field(default_factory=lambda: FFNConfig("dense"))

    def config(self, size: Size, d_ff: int) -> LanguageModelConfig:
        return LanguageModelConfig(
            size.d_model,
            size.num_layers,
            size.n_heads,
            size.context_length,
            mixer=self.mixer,
            mixer_args=self.mixer_args,
            attention_at=(size.num_layers // 2,) if self.is_hybrid else (),
            ffn=FFNConfig(**{**vars(self.ffn), "d_ff": d_ff}),
        )


_tiles = partial(FFNConfig, num_tiles=NUM_TILES, top_k=TOP_K, route_on="hidden")
_one_way, _hermitian = ({"hopping": hopping} for hopping in ("one_way", "hermitian"))
CONTESTANTS = {
    "attention": Contestant("attention"),
    "attention + convolution": Contestant(f"{__name__}.ConvAttention"),
    "minGRU": Contestant(f"{__name__}.MinGRU"),
    "ssd": Contestant("ssd"),
    "one_way": Contestant(mixer_args=_one_way),
    "hermitian": Contestant(mixer_args=_hermitian),
    "ssd, expand 2": Contestant("ssd", {"expand": 2}),
    "one_way, expand 2": Contestant(mixer_args=_one_way | {"expand": 2}),
    "hermitian, expand 2": Contestant(mixer_args=_hermitian | {"expand": 2}),
    "hermitian, no gauge": Contestant(mixer_args=_hermitian | {"gauge": False}),
    "hermitian, vector state": Contestant(mixer_args=_hermitian | {"d_state": 0}),
    "hermitian, 1 block of attention": Contestant(mixer_args=_hermitian, is_hybrid=True),
    "one_way, expand 2, 1 block of attention": Contestant(mixer_args=_one_way | {"expand": 2}, is_hybrid=True),
    "hermitian, tiles by phase": Contestant(mixer_args=_hermitian, ffn=_tiles(routing="scattering")),
    "hermitian, tiles by signature": Contestant(mixer_args=_hermitian, ffn=_tiles(routing="explicit")),
    "TriX": Contestant("attention", ffn=_tiles(routing="explicit")),
}
_variants = resolvent_variants.__name__
VARIANTS = {
    "hermitian, rotations": Contestant(f"{_variants}.RotatingResolvent", _hermitian),
    "one_way, rotations": Contestant(f"{_variants}.RotatingResolvent", _one_way),
    "ssd, rotations": Contestant(f"{_variants}.RotatingSSD"),
    "hermitian, eta .1 to 2": Contestant(f"{_variants}.EtaResolvent", _hermitian | {"eta_start": (0.1, 2.0)}),
    "hermitian, eta .001 to .1": Contestant(f"{_variants}.EtaResolvent", _hermitian | {"eta_start": (0.001, 0.1)}),
}
CONTESTANTS |= VARIANTS
_layers = {"Mamba2": "Mamba2", "GatedDeltaNet": "GatedDeltaNet", "xLSTM": "XLSTM"}
OF_LIBRARY = {name: Contestant(f"{library_contestants.__name__}.{layer}") for name, layer in _layers.items()}
CONTESTANTS |= OF_LIBRARY


def chosen(only: list[str] | None) -> list[str]:
    """The contestants asked for; by default all but the variants, as far as they can be made here: it is said which cannot.

    Raises:
        SystemExit: one is asked for that cannot be made.
    """
    names = [name for name in CONTESTANTS if name not in VARIANTS] if only is None else only
    missing = [] if library_contestants.IS_INSTALLED else [name for name in names if name in OF_LIBRARY]
    if missing:
        said = f"contestants ({', '.join(missing)}) need transformers: pip install -e '.[transformers]'"
        if only is not None:
            raise SystemExit(said)
        print(f"left out: {said}")
    return [name for name in names if name not in missing]


def fitted_config(contestant: Contestant, vocab_size: int, size: Size) -> LanguageModelConfig:
    """The configuration whose width d_ff gives a model of size.num_parameters.

    Raises:
        ValueError: no d_ff comes within 1 %.
    """
    step = contestant.ffn.num_tiles if contestant.ffn.kind == "trix" else 1
    one, two = (num_parameters(vocab_size, contestant.config(size, step * steps)) for steps in (1, 2))
    config = contestant.config(size, step * max(1, 1 + round((size.num_parameters - one) / (two - one))))
    found = num_parameters(vocab_size, config)
    if abs(found - size.num_parameters) > MAX_EXCESS * size.num_parameters:
        raise ValueError(f"parameters of {contestant.mixer} ({found}) must be within 1 % of {size.num_parameters}")
    return config


def num_parameters(vocab_size: int, config: LanguageModelConfig) -> int:
    return sum(parameter.numel() for parameter in LanguageModel(vocab_size, config).parameters())
