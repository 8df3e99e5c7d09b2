"""Keys and values of the tokens before, as an exported language model takes and returns them. onnxruntime and numpy alone.

Inputs ``past_key_i`` and ``past_value_i`` of layer i: float32 [B, H, P, W], P = 0 for a text's beginning. Outputs
``present_key_i`` and ``present_value_i``: [B, H, P + T, W], the inputs of the next call. Legend: B texts, H heads of width W,
T tokens after the P before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ort_ops.file_format import MAX_AXIS, ModelFileError


def past_names(num_layers: int) -> list[str]:
    return [f"past_{part}_{layer}" for layer in range(num_layers) for part in ("key", "value")]


def present_names(num_layers: int) -> list[str]:
    return [f"present_{part}_{layer}" for layer in range(num_layers) for part in ("key", "value")]


def empty_caches(session: ort.InferenceSession, batch_size: int) -> dict[str, NDArray[np.float32]]:
    """Of no token before, by the names of the session's inputs; empty for a model that takes none.

    Raises:
        ModelFileError: an input has another shape than a cache.
    """
    caches = {}
    for value in session.get_inputs()[1:]:
        sizes = value.shape[1::2]
        if len(value.shape) != 4 or not all(type(size) is int and 1 <= size <= MAX_AXIS for size in sizes):
            rule = f"texts, heads, tokens, width, with heads and width >= 1 and <= {MAX_AXIS}"
            raise ModelFileError(f"shape of input {value.name} ({value.shape!r:.80}) must be {rule}")
        caches[value.name] = np.zeros((batch_size, sizes[0], 0, sizes[1]), dtype=np.float32)
    return caches


def run_session(
    session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]
) -> Sequence[NDArray[Any]]:
    """The named outputs.

    Raises:
        ModelFileError: onnxruntime says that the graph cannot compute them.
    """
    try:
        return session.run(list(outputs), dict(inputs))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ModelFileError(f"onnxruntime can't run it: {' '.join(str(error).split())}") from error


class CachedReader:
    """Reads texts piece by piece and computes each token once. Belongs to one thread; the session can be shared.

    Attributes:
        num_tokens: read so far, of each text.
    """

    def __init__(self, session: ort.InferenceSession, batch_size: int = 1) -> None:
        self._session, self.num_tokens = session, 0
        self._past = empty_caches(session, batch_size)
        self._present = present_names(len(self._past) // 2)

    def read(self, token_BT: NDArray[np.int64], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs for the tokens that come next; errors as :func:`run_session`."""
        answers = run_session(self._session, [*outputs, *self._present], {"token": token_BT, **self._past})
        self._past = dict(zip(self._past, answers[len(outputs) :], strict=True))
        self.num_tokens += token_BT.shape[1]
        return list(answers[: len(outputs)])
