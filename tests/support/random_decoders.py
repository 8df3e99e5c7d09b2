"""Ternary decoders of random weights, and what they answer, computed in numpy."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ort_ops.ternary_models.types import DecoderConfig, TernaryMatrix

BITNET = DecoderConfig(
    hidden_size=256,
    num_layers=3,
    num_heads=8,
    num_key_value_heads=2,
    head_size=32,
    intermediate_size=384,
    vocab_size=320,
    max_position=128,
    rope_theta=500000.0,
    norm_epsilon=1e-5,
    activation="relu2",
    has_sub_norms=True,
    is_head_tied=True,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=0,
)
LLAMA = replace(BITNET, activation="silu", has_sub_norms=False, is_head_tied=False, num_key_value_heads=8, rope_theta=10000.0)
CONFIGS = {"bitnet": BITNET, "llama": LLAMA}
Product = Callable[[str, np.ndarray], np.ndarray]


class RandomCheckpoint:
    """A checkpoint of random weights, each of which depends on the seed and its name alone."""

    format = "random weights"

    def __init__(self, config: DecoderConfig, seed: int = 0, *, scale_per_row: bool = False) -> None:
        self.config, self._seed, self._scale_per_row = config, seed, scale_per_row
        self.sources: Mapping[str, str] = {"model.safetensors": "0" * 64}
        self.tokenizer_files: tuple[Path, ...] = ()

    def _random(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, *name.encode()])

    def ternary(self, name: str) -> TernaryMatrix:
        config, random = self.config, self._random(name)
        q_width, kv_width = config.num_heads * config.head_size, config.num_key_value_heads * config.head_size
        hidden, ffn = config.hidden_size, config.intermediate_size
        shapes = {"q": (q_width, hidden), "k": (kv_width, hidden), "v": (kv_width, hidden), "o": (hidden, q_width)}
        shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        N, K = shapes[name.split(".")[-1]]
        scale = random.uniform(0.8, 1.2, N if self._scale_per_row else ()) * 1.2 / K**0.5
        return TernaryMatrix(random.integers(-1, 2, (N, K), dtype=np.int8), np.float32(scale))

    def float32(self, name: str) -> np.ndarray:
        config, random = self.config, self._random(name)
        if name in ("embedding", "head"):
            # So small that the layers say what comes next: else a tied model repeats its last token for ever.
            return random.standard_normal((config.vocab_size, config.hidden_size), dtype=np.float32) * np.float32(0.1)
        widths = {"attention_sub_norm": config.num_heads * config.head_size, "ffn_sub_norm": config.intermediate_size}
        return random.uniform(0.5, 1.5, widths.get(name.split(".")[-1], config.hidden_size)).astype(np.float32)


def quantised_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers of BitLinear, and their step for each token."""
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    return np.rint(x * (np.float32(127) * (np.float32(1) / largest))), largest / np.float32(127)


def bit_linear_reference(x: np.ndarray, matrix: TernaryMatrix) -> np.ndarray:
    """BitLinear in float64: x [..., K] -> [..., N]."""
    q, step = quantised_activations(x)
    return (q.astype(np.float64) @ matrix.code_NK.T.astype(np.float64)) * np.float64(matrix.scale) * step.astype(np.float64)


def decode(checkpoint: RandomCheckpoint, token_BT: np.ndarray, num_used_B: np.ndarray, product: Product) -> np.ndarray:
    """Logits [B, T, V] of texts of which the first tokens are used; product(name, x) is what stands for BitLinear."""
    config = checkpoint.config
    B, T = token_BT.shape
    H, G, W = config.num_heads, config.num_key_value_heads, config.head_size

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return (x / np.sqrt(mean + config.norm_epsilon) * checkpoint.float32(name)).astype(np.float32)

    angle_TW = np.arange(T)[:, None] / config.rope_theta ** (np.arange(0, W, 2) / W)
    cos, sin = np.cos(angle_TW)[:, None], np.sin(angle_TW)[:, None]

    def rotate(x_BTHW: np.ndarray) -> np.ndarray:
        first, second = np.split(x_BTHW, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    place = np.arange(T)
    is_seen_B1TT = (place[:, None] >= place) & (place < num_used_B[:, None, None])[:, None]
    h = checkpoint.float32("embedding")[token_BT]
    for layer in range(config.num_layers):
        scope = f"layers.{layer}"
        x = norm(f"{scope}.attention_norm", h)
        q, k, v = (product(f"{scope}.{name}", x).reshape(B, T, -1, W) for name in ("q", "k", "v"))
        q, k, v = rotate(q), np.repeat(rotate(k), H // G, axis=2), np.repeat(v, H // G, axis=2)
        score = np.einsum("bthw,bshw->bhts", q, k) / W**0.5
        power = np.exp(np.where(is_seen_B1TT, score - score.max(-1, keepdims=True), -np.inf))
        y = np.einsum("bhts,bshw->bthw", power / power.sum(-1, keepdims=True), v).reshape(B, T, H * W).astype(np.float32)
        y = norm(f"{scope}.attention_sub_norm", y) if config.has_sub_norms else y
        h = (h + product(f"{scope}.o", y)).astype(np.float32)
        x = norm(f"{scope}.ffn_norm", h)
        gate, up = product(f"{scope}.gate", x), product(f"{scope}.up", x)
        active = np.maximum(gate, 0) ** 2 if config.activation == "relu2" else gate / (1 + np.exp(-gate))
        y = (active * up).astype(np.float32)
        y = norm(f"{scope}.ffn_sub_norm", y) if config.has_sub_norms else y
        h = (h + product(f"{scope}.down", y)).astype(np.float32)
    return norm("norm", h) @ checkpoint.float32("embedding" if config.is_head_tied else "head").T
