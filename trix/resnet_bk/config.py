"""The settings of the ResNet-BK language model, by the keys of its interface."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from trix.nn.feed_forward import FFNConfig
from trix.nn.language_model import LanguageModelConfig
from trix.nn.resolvent_mixer import check_causal_mode

MIXER = "trix.resnet_bk.mixer.BirmanSchwingerMixer"
MAX_SEQUENCE = 2**16
OPTIONAL = frozenset({"schatten_threshold", "low_rank"})  # null is a value of theirs
MAX_POWER = 64  # 2^64 is beyond every sequence


@dataclass(frozen=True)
class ResNetBKConfig:
    """Size and kind of a :class:`~trix.resnet_bk.LanguageModel`.

    Args:
        vocab_size: tokens. d_model: width. n_layers: blocks. n_seq: longest sequence.
        epsilon, k_max, prime_bump_scale: settings of :class:`~trix.resnet_bk.PrimeBumpPotential`, where ``use_prime_bump`` is
            true; epsilon is also the number of mean distances between levels that ``use_lap`` keeps eta above.
        num_experts: tiles of a layer. top_k: tiles per token.
        use_scattering_router: tiles by the phase of the resolvent; else by signatures of the embedding.
        use_act: each token ends its computation after a block of its own choice. act_halt_threshold: once less than this is
            left; see :class:`~trix.nn.halting.Halting`.
        use_mourre: :meth:`~trix.resnet_bk.LanguageModel.diagnostics` checks the commutator identities. use_lap: see
            :class:`~trix.resnet_bk.mixer.BirmanSchwingerMixer`.
        schatten_threshold: bound on the trace norm of the Birman-Schwinger operator, kept by a limit on the potential v_i of
            each token, |v_i| <= schatten_threshold * eta_i / n_seq. 100 is the interface's default. It is a narrow limit where
            eta is small: .008 with n_seq = 128 and eta = .01. None sets no limit and gives up no other bound, as |G| eta <= 1
            holds for every potential; configs/resnet_bk.yaml trains without one.
        use_semiseparable: queries and keys weigh the past, y_i = sum_j L_ij (q_i . k_j) u_j, whose matrix is semiseparable of
            rank ``low_rank``, by default ceil(log2 n_seq). False: y_i = sum_j L_ij u_j.
        n_heads: heads. hopping: ``hermitian`` or ``one_way``; with the latter, the default of other models, the phase that
            the scattering router reads depends on the token alone. ternary_mixer: ternary projections of the mixers, besides
            the tiles. attention_at: places of blocks that mix by attention; with the scattering router there can be none.

    Raises:
        ValueError: a value of another type, a size below 1, n_seq > 2^16, low_rank > n_seq, k_max > 64, top_k > num_experts,
        epsilon <= 0, attention_at that names no block or stands with the scattering router; by :meth:`from_mapping` an unknown
        key.
    """

    vocab_size: int = 30000
    d_model: int = 256
    n_layers: int = 6
    n_seq: int = 512
    epsilon: float = 1.0
    use_prime_bump: bool = True
    num_experts: int = 4
    top_k: int = 2
    use_scattering_router: bool = True
    use_act: bool = False
    prime_bump_scale: float = 0.02
    k_max: int = 3
    use_mourre: bool = True
    use_lap: bool = True
    schatten_threshold: float | None = 100.0
    use_semiseparable: bool = True
    low_rank: int | None = None
    act_halt_threshold: float = 0.2
    n_heads: int = 8
    hopping: str = "hermitian"
    ternary_mixer: bool = False
    attention_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), int if f.name == "low_rank" else type(f.default)
            if not _is(value, kind) and not (value is None and f.name in OPTIONAL):
                raise ValueError(f"{f.name} ({value!r:.40}) must be {kind.__name__}")
        for name in ("vocab_size", "d_model", "n_layers", "n_seq", "num_experts", "top_k", "k_max", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be >= 1")
        if self.n_seq > MAX_SEQUENCE:
            raise ValueError(f"n_seq ({self.n_seq}) must be <= {MAX_SEQUENCE}")
        if self.low_rank is not None and self.low_rank < 1:
            raise ValueError(f"low_rank ({self.low_rank}) must be >= 1")
        if self.low_rank is not None and self.low_rank > self.n_seq:
            raise ValueError(f"low_rank ({self.low_rank}) must be <= n_seq ({self.n_seq})")
        if not all(0 <= place < self.n_layers for place in self.attention_at):
            raise ValueError(f"attention_at ({list(self.attention_at)}) must be >= 0 and < n_layers ({self.n_layers})")
        if self.attention_at and self.use_scattering_router:
            raise ValueError(
                f"attention_at ({list(self.attention_at)}) must be empty with use_scattering_router (True): "
                "attention has no phase"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must be <= num_experts ({self.num_experts})")
        if self.k_max > MAX_POWER:
            raise ValueError(f"k_max ({self.k_max}) must be <= {MAX_POWER}")
        if not math.isfinite(self.prime_bump_scale):
            raise ValueError(f"prime_bump_scale ({self.prime_bump_scale}) must be finite")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon ({self.epsilon}) must be > 0 and finite")
        if not 0 < self.act_halt_threshold < 1:
            raise ValueError(f"act_halt_threshold ({self.act_halt_threshold}) must be > 0 and < 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of a file or of keyword arguments; an unknown key is an error that names the nearest one.

        The key ``mode`` of the interface may be "causal", which all language models are.
        """
        known = [f.name for f in fields(cls)]
        check_causal_mode(values.get("mode", "causal"))
        values = {key: value for key, value in values.items() if key != "mode"}
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"key ({key}) must be one of the configuration's; the nearest is {nearest}")
        places = values.get("attention_at", ())
        return cls(**{**values, "attention_at": tuple(places) if isinstance(places, list) else places})

    def network(self) -> LanguageModelConfig:
        """The same as the configuration of a :class:`trix.nn.LanguageModel`."""
        rank = math.ceil(math.log2(self.n_seq)) if self.low_rank is None else self.low_rank
        mixer_args = {
            "prime_bump_scale": self.prime_bump_scale if self.use_prime_bump else 0.0,
            "epsilon": self.epsilon,
            "k_max": self.k_max,
            "schatten_threshold": self.schatten_threshold,
            "use_lap": self.use_lap,
            "d_state": max(rank, 1) if self.use_semiseparable else 0,
            "hopping": self.hopping,
        }
        return LanguageModelConfig(
            d_model=self.d_model,
            num_layers=self.n_layers,
            n_heads=self.n_heads,
            context_length=self.n_seq,
            ternary_attention=self.ternary_mixer,
            ffn=FFNConfig(
                num_tiles=self.num_experts,
                top_k=self.top_k,
                routing="scattering" if self.use_scattering_router else "explicit",
            ),
            mixer=MIXER,
            mixer_args=mixer_args,
            attention_at=self.attention_at,
            halt_threshold=self.act_halt_threshold if self.use_act else None,
        )


def _is(value: object, kind: type) -> bool:
    """Whether the value is of this kind; a truth value is no number, and a whole number is a float."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is tuple:
        return isinstance(value, tuple) and all(type(place) is int for place in value)
    return isinstance(value, (int, float) if kind is float else kind)
