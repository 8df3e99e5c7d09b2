"""What torch answers on held-out input, what onnxruntime answers with the exported file, and whether they agree.

Here for language models and classifiers, in :mod:`ort_ops.own_module` for all others. Legend: B sequences, T tokens,
V vocabulary, C classes, L routed layers, K tiles per token.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from ort_ops.library import LibraryNotFoundError, session_options
from ort_ops.parity import Drift, OutputDrift, OutputParity, Parity, compare, drift, selection_gap
from ort_ops.reference import LogitsReference
from ort_ops.state import StatefulReader, empty_state
from trix.nn import Classifier, LanguageModel, routed_layers

MAX_RELATIVE_DIFFERENCE = 1e-4
CHECK_BATCH = 16


class ExportError(ValueError):
    """The model can't be exported, or what was exported does not compute the same; no file was written."""


class Expectation(Protocol):
    """What torch answers, against which a file is held."""

    def parity(self, session: ort.InferenceSession) -> Parity | OutputParity:
        """Raises ExportError where the file's answers differ."""

    def stepwise_parity(self, session: ort.InferenceSession) -> Parity | None:
        """The same token by token; None where the file does not read so."""

    def drift(self, session: ort.InferenceSession) -> Drift | OutputDrift:
        """How far the file's answers are from torch's, where they need not be the same."""

    def reference(self, session: ort.InferenceSession | None = None) -> dict[str, Any]:
        """What travels in the file: an example with torch's answer, or with that of the file in a session."""


class Answer(NamedTuple):
    """logits [B, T, V] or [B, C]; tile_idx [B, T, L, K] where layers are routed."""

    logits: NDArray[np.float32]
    tile_idx: NDArray[np.int64] | None


class HeldOutAnswers:
    """Torch's answers to held-out input [B, T] or [B, T, F]; gap [B, T, L]: margin by which the tiles were chosen."""

    def __init__(self, model: LanguageModel | Classifier, held_out: Tensor) -> None:
        self._held_out, self._is_language_model = held_out, isinstance(model, LanguageModel)
        layers = routed_layers(model)
        logits, tile_idx, gap = [], [], []
        with torch.no_grad():
            for part in torch.split(held_out, CHECK_BATCH):
                part_logits, infos, _ = model(part, return_routing=True)
                logits.append(part_logits.numpy())
                if infos:
                    tile_idx.append(torch.stack([info["tile_idx"] for info in infos], dim=2).numpy())
                    scores = [info["scores"] + layer.router.balance_bias for info, layer in zip(infos, layers, strict=True)]
                    gap.append(np.stack([selection_gap(s.numpy(), tile_idx[-1].shape[-1]) for s in scores], axis=2))
        self.answer = Answer(np.concatenate(logits), np.concatenate(tile_idx) if tile_idx else None)
        self.gap: NDArray[np.float32] | None = np.concatenate(gap) if gap else None

    def parity(self, session: ort.InferenceSession) -> Parity:
        return self._parity(run_whole(session, self._held_out), "")

    def stepwise_parity(self, session: ort.InferenceSession) -> Parity | None:
        if not self._is_language_model:
            return None
        return self._parity(run_stepwise(session, self._held_out[:CHECK_BATCH]), "read token by token (the mixers' state): ")

    def _parity(self, actual: Answer, how: str) -> Parity:
        """Compares the first sequences, as many as actual holds; how they were read begins the error."""
        (logits, tile_idx), gap, num = self.answer, self.gap, len(actual.logits)
        if tile_idx is None or gap is None:
            parity = compare(actual.logits, logits[:num])
        else:
            parity = compare(actual.logits, logits[:num], actual.tile_idx, tile_idx[:num], gap[:num])
        if not parity.agrees(MAX_RELATIVE_DIFFERENCE):
            raise ExportError(
                f"{how}max relative difference to torch ({parity.max_relative_difference:.1e}) must be < "
                f"{MAX_RELATIVE_DIFFERENCE:.0e} and tokens routed differently without a near tie ({parity.num_unexplained}) "
                "must be 0"
            )
        return parity

    def drift(self, session: ort.InferenceSession) -> Drift:
        return drift(*run_whole(session, self._held_out), *self.answer)

    def reference(self, session: ort.InferenceSession | None = None) -> dict[str, Any]:
        first = self._held_out[:1]
        logits, tile_idx = self.answer if session is None else run_whole(session, first)
        if tile_idx is None or self.gap is None:
            return LogitsReference(first.numpy(), logits[:1], by_torch=session is None).to_metadata()
        routing = tile_idx[:1], self.gap[:1]
        return LogitsReference(first.numpy(), logits[:1], *routing, by_torch=session is None).to_metadata()


def open_session(path: Path) -> tuple[ort.InferenceSession, bool]:
    """A session, and whether it runs the native kernels: the portable functions where they are not installed."""
    try:
        options, used_library = session_options(), True
    except LibraryNotFoundError:
        options, used_library = ort.SessionOptions(), False
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), used_library


def run_whole(session: ort.InferenceSession, held_out: Tensor) -> Answer:
    """Each sequence at once, with nothing before it."""
    name, outputs = session.get_inputs()[0].name, _output_names(session)
    parts = [
        session.run(outputs, {name: part.numpy(), **empty_state(session, len(part))})
        for part in torch.split(held_out, CHECK_BATCH)
    ]
    return _joined(parts, axis=0)


def run_stepwise(session: ort.InferenceSession, token_BT: Tensor) -> Answer:
    """The first half of each text at once, then token by token."""
    reader, outputs = StatefulReader(session, len(token_BT)), _output_names(session)
    half, length = token_BT.shape[1] // 2, token_BT.shape[1]
    parts = [token_BT[:, :half], *(token_BT[:, place : place + 1] for place in range(half, length))]
    return _joined([reader.read(part.contiguous().numpy(), outputs) for part in parts], axis=1)


def _output_names(session: ort.InferenceSession) -> list[str]:
    return [value.name for value in session.get_outputs() if value.name in ("logits", "tile_idx")]


def _joined(parts: list[list[NDArray[Any]]], axis: int) -> Answer:
    logits, *tile_idx = (np.concatenate(output, axis=axis) for output in zip(*parts, strict=True))
    return Answer(logits, tile_idx[0] if tile_idx else None)
