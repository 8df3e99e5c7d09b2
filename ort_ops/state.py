"""What an exported language model keeps of the tokens before, as it takes and returns it. onnxruntime and numpy alone.

Each tensor of a layer's state is an input ``past_NAME_LAYER`` and an output ``present_NAME_LAYER``, the input of the next call.
Attention has ``key`` and ``value``: float32 [B, H, P, W] for H heads of width W and the P tokens before, P = 0 at a text's
beginning. Resolvent and SSD mixers keep a state of fixed size: ``conv`` [B, C, S], the last S inputs of the convolution, and
``carry`` [B, H, N, W, 2] for queries of width N, [B, H, W, 2] without queries; with hermitian hopping also ``pivot`` [B, H, 2].
The axis of 2 holds real and imaginary part. Axes that are no numbers in the file are dynamic: the first is the number of texts,
another one grows with P.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ort_ops.file_format import MAX_AXIS, ModelFileError

PAST, PRESENT = "past_", "present_"
MAX_STATE_ELEMENTS = 2**24  # of one tensor of one text, where the file alone says how many


def past_name(name: str, layer: int) -> str:
    return f"{PAST}{name}_{layer}"


def present_name(past: str) -> str:
    """The output that belongs to an input."""
    return PRESENT + past.removeprefix(PAST)


def past_names(session: ort.InferenceSession) -> list[str]:
    """The inputs that hold state, in order."""
    return [value.name for value in session.get_inputs() if value.name.startswith(PAST)]


def empty_state(session: ort.InferenceSession, batch_size: int) -> dict[str, NDArray[np.float32]]:
    """Zeros for a text's beginning, by the names of the session's inputs; empty for a model that keeps nothing.

    Raises:
        ModelFileError: an input has another shape than a state.
    """
    state = {}
    for value in session.get_inputs():
        if value.name.startswith(PAST):
            sizes = value.shape[1:]
            _check_sizes(value.name, value.shape)
            shape = (batch_size, *(size if isinstance(size, int) else 0 for size in sizes))
            state[value.name] = np.zeros(shape, dtype=np.float32)
    return state


def _check_sizes(name: str, shape: Sequence[Any]) -> None:
    fixed = [size for size in shape[1:] if isinstance(size, int)]
    if not shape or isinstance(shape[0], int) or not all(1 <= size <= MAX_AXIS for size in fixed):
        rule = f"texts, which are dynamic, then sizes >= 1 and <= {MAX_AXIS}"
        raise ModelFileError(f"shape of input {name} ({shape!r:.80}) must be {rule}")
    if len(fixed) == len(shape) - 1 and math.prod(fixed) > MAX_STATE_ELEMENTS:
        raise ModelFileError(f"elements of input {name} ({math.prod(fixed)}) must be <= {MAX_STATE_ELEMENTS}")


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


class StatefulReader:
    """Reads texts piece by piece and computes each token once. Belongs to one thread; the session can be shared.

    Attributes:
        num_tokens: read so far, of each text.
    """

    def __init__(self, session: ort.InferenceSession, batch_size: int = 1) -> None:
        self._session, self.num_tokens = session, 0
        self._past = empty_state(session, batch_size)
        self._present = [present_name(name) for name in self._past]

    def read(self, token_BT: NDArray[np.int64], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs for the tokens that come next; errors as :func:`run_session`."""
        answers = run_session(self._session, [*outputs, *self._present], {"token": token_BT, **self._past})
        self._past = dict(zip(self._past, answers[len(outputs) :], strict=True))
        self.num_tokens += token_BT.shape[1]
        return list(answers[: len(outputs)])
