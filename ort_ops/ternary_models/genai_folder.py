"""Texts from a folder that :func:`~ort_ops.ternary_models.decoder_folder.write_decoder` wrote, by onnxruntime-genai.

onnxruntime-genai does what genai_config.json says: it loads the native library that is named there, and whatever else a
configuration of its own can name; names with a %d are formats for printf, which could write anywhere in memory. So nothing but
what is written here is passed on to it.
"""

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ort_ops.external_data import check_external_data
from ort_ops.file_format import ModelFileError
from ort_ops.library import LIBRARY_NAME, get_library_path
from ort_ops.runtime import check_num_threads
from ort_ops.ternary_models.names import GENAI_CONFIG, INPUTS, MODEL, OUTPUTS
from trix.regular_files import read_regular

MAX_CONFIG_BYTES, MAX_LIBRARY_BYTES, MAX_SIZE = 2**20, 2**28, 2**24
MAX_SEED = 2**31 - 1  # onnxruntime-genai's
_KEYS = {
    "": {"model", "search"},
    "model": {"type", "context_length", "vocab_size", "decoder", "bos_token_id", "eos_token_id", "pad_token_id"},
    "model.decoder": {
        *("session_options", "filename", "inputs", "outputs"),
        *("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    },
    "model.decoder.session_options": {"log_id", "provider_options", "custom_ops_library"},
    "search": {
        *("do_sample", "max_length", "min_length", "past_present_share_buffer"),
        *("random_seed", "repetition_penalty", "temperature", "top_k", "top_p"),
    },
}
_VALUES = {
    "model.type": ("llama",),
    "model.decoder.filename": (MODEL,),
    "model.decoder.inputs": (INPUTS,),
    "model.decoder.outputs": (OUTPUTS,),
    "model.decoder.session_options.provider_options": ([],),
    "model.decoder.session_options.custom_ops_library": (LIBRARY_NAME, None),
}
_SIZES = (
    *("model.context_length", "model.vocab_size"),
    *("model.decoder.head_size", "model.decoder.hidden_size", "model.decoder.num_hidden_layers"),
    *("model.decoder.num_attention_heads", "model.decoder.num_key_value_heads"),
)


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a folder that is safe to run.

    Raises:
        ModelFileError: the configuration names something that is not written here, the library is not the one of this
            installation, or a file is missing or damaged. LibraryNotFoundError: no native library is installed.
    """
    if not (folder / GENAI_CONFIG).exists():
        raise ModelFileError(f"{folder}: a folder without {GENAI_CONFIG}, not one of `trix import`")
    try:
        config = json.loads(read_regular(folder / GENAI_CONFIG, MAX_CONFIG_BYTES), object_pairs_hook=_without_repeats)
        check_external_data(folder / MODEL)
    except OSError as error:
        raise ModelFileError(f"{error.filename or folder}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{folder}: {error}") from error
    for path, keys in _KEYS.items():
        section = _at(config, path)
        if not isinstance(section, dict) or not section.keys() <= keys:
            found = sorted(section.keys() - keys) if isinstance(section, dict) else section
            raise ModelFileError(
                f"{folder / GENAI_CONFIG}: {path or 'it'} must hold {', '.join(sorted(keys))} alone, not {reprlib.repr(found)}"
            )
    for path, values in _VALUES.items():
        if _at(config, path) not in values:
            raise ModelFileError(f"{folder / GENAI_CONFIG}: {path} ({reprlib.repr(_at(config, path))}) must be {values[0]!r}")
    for path in _SIZES:
        size = _at(config, path)
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise ModelFileError(
                f"{folder / GENAI_CONFIG}: {path} ({reprlib.repr(size)}) must be an integer >= 1 and <= {MAX_SIZE}"
            )
    if _at(config, "model.decoder.session_options.custom_ops_library") is not None:
        _check_library(folder / LIBRARY_NAME)
    return dict(config)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of two values with one name Python keeps the last, but onnxruntime-genai reads both."""
    names = [name for name, _ in pairs]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{GENAI_CONFIG}: name {reprlib.repr(repeated)} must stand once in an object")
    return dict(pairs)


def _at(config: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _check_library(path: Path) -> None:
    """Raises ModelFileError unless the file is the library of this installation: a library is code."""
    installed = get_library_path()
    try:
        digests = [sha256(read_regular(one, MAX_LIBRARY_BYTES)).digest() for one in (path, installed)]
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    if digests[0] != digests[1]:
        raise ModelFileError(f"{path} must be the library of this installation, as it is code; copy {installed} there")


class GenaiDecoder:
    """A folder with its tokenizer, loaded.

    Attributes:
        context_length: tokens of a prompt and its continuation at most.

    Raises:
        ModelFileError: as :func:`check_folder`, or onnxruntime-genai cannot load the folder. ValueError: num_threads out of its
        range. ImportError: onnxruntime-genai is missing.
    """

    def __init__(self, folder: Path, num_threads: int | None = None) -> None:
        options = {"log_severity_level": 4}  # its errors are raised, too
        if num_threads is not None:
            check_num_threads(num_threads)
            options["intra_op_num_threads"] = num_threads
        config = check_folder(folder)
        import onnxruntime_genai as genai

        self._genai, self._folder = genai, folder
        genai.disable_telemetry_events()
        with self._told("load"):
            settings = genai.Config(str(folder))
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = genai.Model(settings)
            self._tokenizer = genai.Tokenizer(self._model)
        self.context_length: int = _at(config, "model.context_length")
        self._vocab_size: int = _at(config, "model.vocab_size")

    def generate(self, prompt: str, num_tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
        """Yield what follows the prompt, token by token, until the text ends or num_tokens are written.

        Raises:
            ValueError: at the call, a prompt that is empty, too long, not Unicode text, or has tokens that the model does not
                know; a setting out of its range. ModelFileError: onnxruntime-genai cannot run the folder.
        """
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p ({top_p}) must be > 0 and <= 1")
        for name, value in (("num_tokens", num_tokens), ("temperature", temperature), ("seed", seed)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} ({value}) must be finite and >= 0")
        if seed > MAX_SEED:
            raise ValueError(f"seed ({seed}) must be <= {MAX_SEED}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt must be Unicode text: {error.reason} (place {error.start})") from error
        with self._told("run"):
            token_T = self._tokenizer.encode(prompt)
        if not len(token_T):
            raise ValueError("the prompt must have at least 1 token, got 0")
        if len(token_T) + num_tokens > self.context_length:
            rule = f"must be <= the context of the model ({self.context_length} tokens)"
            raise ValueError(f"tokens of the prompt ({len(token_T)}) + num_tokens ({num_tokens}) {rule}")
        if max(token_T) >= self._vocab_size:
            rule = f"must be < vocab_size ({self._vocab_size}): the tokenizer is another model's"
            raise ValueError(f"tokens of the prompt ({max(token_T)} is the largest) {rule}")
        parameters = self._genai.GeneratorParams(self._model)
        sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_p": top_p, "top_k": 0}
        with self._told("run"):
            parameters.set_search_options(max_length=len(token_T) + num_tokens, random_seed=seed, **sampling)
            generator = self._genai.Generator(self._model, parameters)
            generator.append_tokens(token_T)
        return self._pieces(generator, num_tokens)

    def _pieces(self, generator: Any, num_tokens: int) -> Iterator[str]:
        stream = self._tokenizer.create_stream()
        for _ in range(num_tokens):
            with self._told("run"):
                generator.generate_next_token()
                if generator.is_done() and generator.get_next_tokens()[0] in self._ends():
                    return
                piece = stream.decode(generator.get_next_tokens()[0])
            yield piece

    @contextmanager
    def _told(self, action: str) -> Iterator[None]:
        """Errors of onnxruntime-genai, in one line."""
        try:
            yield
        except Exception as error:  # they share no base class of their own
            raise ModelFileError(
                f"{self._folder}: onnxruntime-genai can't {action} it: {' '.join(str(error).split())}"
            ) from error

    def _ends(self) -> list[int]:
        return list(self._tokenizer.eos_token_ids)
