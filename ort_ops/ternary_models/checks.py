"""What every reader of checkpoints checks, and the digest of a file."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ort_ops.ternary_models.errors import CheckpointError
from trix.regular_files import open_regular

MAX_COLUMNS = 2**19 - 16  # of a matrix, as kMaxColumns of the native kernels: what int32 can sum
MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY, MAX_POSITION = 2**12, 2**10, 2**24, 2**20  # beyond those of any model
ROWS_AT_ONCE = 4096  # of tables as long as the vocabulary


def check_heads(num_heads: int, num_key_value_heads: int, head_size: int) -> None:
    """Raises CheckpointError where heads can't share keys or be rotated, or are wider together than a matrix may be."""
    if num_heads % num_key_value_heads:
        raise CheckpointError(f"attention heads ({num_heads}) must be a multiple of key-value heads ({num_key_value_heads})")
    if head_size % 2:
        raise CheckpointError(f"size of an attention head ({head_size}) must be even")
    if num_heads * head_size > MAX_COLUMNS:
        raise CheckpointError(f"columns of o ({num_heads} heads of {head_size}) must be <= {MAX_COLUMNS}")


def check_finite(values: NDArray[np.floating[Any]], name: str) -> None:
    """Raises CheckpointError where a value is NaN or infinite."""
    num_bad = values.size - int(np.isfinite(values).sum())
    if num_bad:
        raise CheckpointError(f"{name} must be finite: of {values.size} values {num_bad} are NaN or infinite")


def file_digest(path: Path) -> str:
    """SHA-256 in hex; a CheckpointError where the file cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
