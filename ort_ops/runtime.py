"""Run an exported model with onnxruntime and numpy alone: no torch, no trix."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ort_ops.external_data import check_external_data
from ort_ops.file_format import LANGUAGE_MODEL, MAX_FILE_BYTES, MODULE, FileRecord, from_properties
from ort_ops.file_format import ModelFileError as ModelFileError
from ort_ops.library import LibraryNotFoundError, session_options
from ort_ops.parity import OutputParity, Parity
from ort_ops.reference import LogitsReference, ModuleReference
from ort_ops.schema import DOMAIN
from ort_ops.state import StatefulReader, empty_state, past_names, present_name, run_session
from trix.regular_files import check_regular

MAX_THREADS = 1024  # beyond what any machine has, a session takes minutes to start, or cannot


class PromptError(ValueError):
    """The prompt can't be encoded."""


class ExportedModel:
    """An exported model of any task in an onnxruntime session, which threads may share: a call changes nothing in it.

    Args:
        path: a file written by ``trix export``. use_library: run the native kernels; otherwise the portable functions in the
            file. num_threads: threads of the session; None leaves the choice to onnxruntime.

    Attributes:
        record: what the exporter wrote (task, configuration, parity at export, ...). metadata: the same as plain JSON values.
        file_bytes, float32_bytes: size of the file with its external data, and of the same parameters at 4 bytes each.
        external_data: which tensors lie in which files next to it.

    Raises:
        ModelFileError: see there. LibraryNotFoundError: use_library without a native library.
    """

    def __init__(self, path: Path | str, use_library: bool = True, num_threads: int | None = None) -> None:
        self.path, self.uses_library = Path(path), use_library
        try:
            check_regular(self.path, MAX_FILE_BYTES)
            self.external_data = check_external_data(self.path)
        except FileNotFoundError as error:
            raise ModelFileError(f"{path}: no such file") from error
        except IsADirectoryError as error:
            raise ModelFileError(f"{path}: a folder, not a file") from error
        except OSError as error:
            raise ModelFileError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from error
        options = session_options() if use_library else ort.SessionOptions()
        if num_threads is not None:
            check_num_threads(num_threads)
            options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            # Without enable_fallback=0 onnxruntime answers some damaged files by printing to stdout and trying again.
            self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ModelFileError(f"{path}: {_explain(error, use_library)}") from error
        try:
            self.metadata = from_properties(self.session.get_modelmeta().custom_metadata_map)
            self.record = FileRecord.from_metadata(self.metadata)
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from error
        self.file_bytes = self.path.stat().st_size + self.external_data.total_bytes
        self.float32_bytes = self.record.float32_bytes

    def _required(self, name: str, kind: type) -> Any:
        try:
            return self.record.require(name, kind)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {error}") from error

    def run(self, inputs: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        """Logits, and tile_idx [B, T, L, K] where the model has routed layers, of whole sequences: with nothing before them.

        Raises:
            ModelFileError: the graph is damaged so that it cannot be run.
        """
        if self.record.task == MODULE:
            raise ModelFileError(f"{self.path}: task ({MODULE}) must be of a model with logits: see run_outputs for this one")
        names = [value.name for value in self.session.get_outputs() if value.name in ("logits", "tile_idx")]
        first = self.session.get_inputs()[0].name
        if names[:1] != ["logits"]:
            raise ModelFileError(f"{self.path}: outputs ({names}) must begin with 'logits'")
        try:
            logits, *tile_idx = run_session(self.session, names, {first: inputs, **empty_state(self.session, len(inputs))})
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from error
        return logits, tile_idx[0] if tile_idx else None

    def run_outputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name, of inputs by name: as they are in the file, whatever its task.

        Raises:
            ModelFileError: onnxruntime cannot run it on these inputs.
        """
        names = [value.name for value in self.session.get_outputs()]
        try:
            return dict(zip(names, run_session(self.session, names, inputs), strict=True))
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from error

    def check_parity(self) -> Parity | OutputParity:
        """Run the held-out example that travels in the file and compare with the answer that torch gave at export, or where
        activations have 8 bits or the file was edited since, with its own at that time.

        Raises:
            ModelFileError: the example is damaged.
        """
        reference = self._required("reference", dict)
        try:
            if self.record.task == MODULE:
                example = ModuleReference.from_metadata(reference)
                return example.parity(self.run_outputs(example.inputs))
            dtype = np.int64 if self.session.get_inputs()[0].type == "tensor(int64)" else np.float32
            expected = LogitsReference.from_metadata(reference, dtype)
            return expected.parity(*self.run(expected.inputs))
        except Exception as error:  # a damaged example fails in as many places as it is used, onnxruntime among them
            cause = f"{type(error).__name__}: {' '.join(str(error).removeprefix(f'{self.path}: ').split())}"
            raise ModelFileError(f"{self.path}: the reference example can't be checked: {cause}") from error


def open_model(path: Path | str) -> ExportedModel:
    """With the native kernels; where they are not installed, with the portable functions."""
    try:
        return ExportedModel(path)
    except LibraryNotFoundError:
        return ExportedModel(path, use_library=False)


class LanguageModelSession(ExportedModel):
    """A language model that answers character by character.

    Attributes:
        vocabulary: the character of each token, in order. context_length: how far it looks back, in tokens.

    Raises:
        ModelFileError: also for a model of another task.
    """

    def __init__(self, path: Path | str, use_library: bool = True, num_threads: int | None = None) -> None:
        super().__init__(path, use_library, num_threads)
        if self.record.task != LANGUAGE_MODEL:
            raise ModelFileError(f"{path}: task ({self.record.task}) must be {LANGUAGE_MODEL}")
        self.vocabulary: str = self._required("vocabulary", str)
        self.context_length: int = self._required("context_length", int)
        self._check_language_model()
        self._token_of = {character: token for token, character in enumerate(self.vocabulary)}

    def _check_language_model(self) -> None:
        if len(set(self.vocabulary)) != len(self.vocabulary) or any("\ud800" <= sign <= "\udfff" for sign in self.vocabulary):
            raise ModelFileError(f"{self.path}: vocabulary ({self.vocabulary!r:.80}) must be distinct characters of Unicode")
        inputs = [value.name for value in self.session.get_inputs()]
        shape_of = {value.name: value.shape for value in self.session.get_outputs()}
        past = past_names(self.session)
        expected = {"logits", *map(present_name, past)}
        if inputs != ["token", *past] or not expected <= shape_of.keys():
            rule = "must be ['token', 'past_NAME_LAYER', ...] and outputs hold 'logits' and a present_ for each past_"
            raise ModelFileError(f"{self.path}: inputs ({inputs}) {rule}, got ({[*shape_of]})")
        if shape_of["logits"][-1:] != [len(self.vocabulary)]:
            rule = f"vocabulary ({len(self.vocabulary)} characters) must be as long as the last axis of logits"
            raise ModelFileError(f"{self.path}: {rule} {shape_of['logits']}")
        try:
            empty_state(self.session, 1)
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a text.

        Raises:
            PromptError: the text is empty or holds a character outside the vocabulary.
        """
        if not text:
            raise PromptError("the prompt must have at least 1 character, got 0")
        unknown = sorted(set(text) - set(self._token_of))
        if unknown:
            raise PromptError(f"the prompt holds {''.join(unknown)!r}, outside the vocabulary {self.vocabulary!r}")
        return [self._token_of[character] for character in text]

    def generate(
        self, prompt: str, num_tokens: int = 200, temperature: float = 0.8, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield num_tokens characters that follow the prompt, as they are drawn. Threads may generate at the same time.

        The prompt, its last context_length tokens, is read once, then each token, with the state of those before. When
        these are context_length tokens, the last half of them is read anew: a token is drawn after the last context_length / 2
        to context_length tokens.

        Args:
            temperature: 0 takes the likeliest character, else logits are divided by it. top_p: draw from the smallest set of
                characters whose probabilities reach it. seed: seed of the draws.

        Raises:
            PromptError, and ValueError for num_tokens < 0, temperature < 0 or top_p outside (0, 1]; at the call, before the
            first character. ModelFileError, while drawing, if the file is so damaged that it cannot be run or a logit is NaN.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens ({num_tokens}) must be >= 0")
        if not (np.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature ({temperature}) must be finite and >= 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p ({top_p}) must be > 0 and <= 1")
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be >= 0")
        return self._generate(self.encode(prompt), num_tokens, temperature, top_p, seed)

    def _generate(self, tokens: list[int], num_tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
        random = np.random.default_rng(seed)
        reader, unread = StatefulReader(self.session), tokens[-self.context_length :]
        for _ in range(num_tokens):
            if reader.num_tokens + len(unread) > self.context_length:
                reader, unread = StatefulReader(self.session), tokens[-max(self.context_length // 2, 1) :]
            try:
                logits = reader.read(np.asarray([unread], dtype=np.int64), ["logits"])[0][0, -1]
            except ModelFileError as error:
                raise ModelFileError(f"{self.path}: {error}") from error
            check_logits(self.path, logits)
            tokens.append(draw(logits, temperature, top_p, random))
            unread = tokens[-1:]
            yield self.vocabulary[tokens[-1]]


def check_num_threads(num_threads: int) -> None:
    """Raises ValueError for a number of threads that no session can have."""
    if not 1 <= num_threads <= MAX_THREADS:
        raise ValueError(f"num_threads ({num_threads}) must be >= 1 and <= {MAX_THREADS}")


def check_logits(path: Path, logits: NDArray[np.float32]) -> None:
    """Raises ModelFileError where the model at this path has answered with NaN."""
    if num_nan := np.isnan(logits).sum():
        raise ModelFileError(f"{path}: logits must be numbers, {num_nan} of {logits.size} are NaN")


def draw(logits: NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """One token from logits [V]: argmax at temperature 0, else from softmax(logits / temperature) cut to its top_p nucleus.

    Source of top_p: Holtzman et al., 2019, nucleus sampling (arXiv:1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) - float(logits.max())
    probability = np.exp(scaled / temperature)
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    cumulative = np.cumsum(probability[order])
    nucleus = order[: int(np.searchsorted(cumulative, top_p)) + 1]
    kept = probability[nucleus]
    return int(random.choice(nucleus, p=kept / kept.sum()))


def _explain(error: Exception, use_library: bool) -> str:
    text = " ".join(str(error).split())
    if f"{DOMAIN}:" in text and "is not a registered function/op" in text and not use_library:
        return "it was exported without portable functions and needs the native library (leave out --no-library)"
    damaged = ("Protobuf parsing failed", "INVALID_PROTOBUF", "No graph was found")
    if isinstance(error, UnicodeDecodeError) or any(sign in text for sign in damaged):
        return "not an ONNX file, or a damaged one"
    return f"onnxruntime can't load it: {text}"
