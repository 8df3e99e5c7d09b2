"""What a reader of ternary checkpoints gives, and what the writer of a decoder takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Activation = Literal["silu", "relu2"]
Head = Literal["int8", "float16", "float32"]  # how a written decoder keeps embedding and head
HEADS: tuple[Head, ...] = ("int8", "float16", "float32")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer whose projections are ternary.

    Sub-norms are the RMSNorms of BitNet b1.58 2B4T before the projections o and down. A tied head is the embedding.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rope_theta: float
    norm_epsilon: float
    activation: Activation
    has_sub_norms: bool
    is_head_tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True)
class TernaryMatrix:
    """W = scale * code: code_NK int8 in {-1, 0, 1}, scale a float32 of all rows, or of each one [N]."""

    code_NK: NDArray[np.int8]
    scale: np.float32 | NDArray[np.float32]


# Names within layer i: "layers.i.q", k, v, o, gate, up, down.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class TernaryCheckpoint(Protocol):
    """A checkpoint, read tensor by tensor; no tensor is kept in memory.

    Vectors and matrices of floats are named "embedding" [vocab, hidden], "head" [vocab, hidden] (only where it is not tied),
    "norm" [hidden], and within layer i "layers.i.attention_norm", "layers.i.ffn_norm" [hidden], "layers.i.attention_sub_norm"
    [num_heads * head_size] and "layers.i.ffn_sub_norm" [intermediate_size] (only with sub-norms).
    """

    config: DecoderConfig
    format: str  # as it is told to the user and kept in the metadata: "Hugging Face, packed"
    tokenizer_files: tuple[Path, ...]

    @property
    def sources(self) -> Mapping[str, str]:
        """SHA-256 by file name; the files are read for it."""
        ...

    def ternary(self, name: str) -> TernaryMatrix: ...

    def float32(self, name: str) -> NDArray[np.float32]: ...
