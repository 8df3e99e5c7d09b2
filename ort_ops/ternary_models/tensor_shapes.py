"""Which tensors a decoder has, under the names of :mod:`ort_ops.ternary_models.types`, and their shapes.

Legend: N rows, K columns of a projection.
"""

import math

from ort_ops.ternary_models.types import PROJECTIONS, DecoderConfig


def ternary_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of each projection; N is the width of its output."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_size, config.num_key_value_heads * config.head_size
    shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"layers.{layer}.{name}": shapes[name] for layer in range(config.num_layers) for name in PROJECTIONS}


def float_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the embedding, the head where it is not tied, and the norms."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embedding": table} if config.is_head_tied else {"embedding": table, "head": table}
    shapes["norm"] = (config.hidden_size,)
    in_layer: dict[str, tuple[int, ...]] = {"attention_norm": (config.hidden_size,), "ffn_norm": (config.hidden_size,)}
    if config.has_sub_norms:
        in_layer |= {"attention_sub_norm": (config.num_heads * config.head_size,), "ffn_sub_norm": (config.intermediate_size,)}
    return shapes | {f"layers.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in in_layer.items()}


def num_parameters(config: DecoderConfig) -> int:
    """Of embedding, head (unless it is tied), norms and projections."""
    return sum(math.prod(shape) for shape in (*float_shapes(config).values(), *ternary_shapes(config).values()))
