"""A ternary decoder as a folder that onnxruntime-genai runs: written as a whole, and verified before it gets its name."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ort_ops.external_weights import session_of
from ort_ops.file_format import DECODER, Activations, FileRecord
from ort_ops.library import LIBRARY_NAME, get_library_path, session_options
from ort_ops.schema import DOMAIN, OPSET_VERSION
from ort_ops.ternary_models.data_file import DataFile
from ort_ops.ternary_models.decoder_graph import MICROSOFT, MIN_MAGNITUDE, PRODUCTS, DecoderGraph
from ort_ops.ternary_models.names import DATA, GENAI_CONFIG, INPUTS, MODEL, OUTPUTS, PAST
from ort_ops.ternary_models.tensor_shapes import num_parameters
from ort_ops.ternary_models.types import DecoderConfig, Head, TernaryCheckpoint
from trix.whole_file import whole_folder

MAX_ERROR = 1e-6  # of a projection, relative to the largest output
_OPSET, _IR_VERSION = 21, 10
_PARITY_TOKENS = 4


class DecoderError(ValueError):
    """The decoder cannot be written, or the folder does not answer as it should."""


@dataclass(frozen=True)
class DecoderReport:
    """What was written.

    parity: largest error of the products that were compared with BitLinear in numpy, relative to the token's largest output, by
    name; empty without the native operators. file_bytes: by file name.
    """

    format: str
    parity: Mapping[str, float]
    file_bytes: Mapping[str, int]

    def __str__(self) -> str:
        total = sum(self.file_bytes.values())
        lines = [f"from    {self.format}", f"size    {total / 1e6:.1f} MB in {len(self.file_bytes)} files"]
        if self.parity:
            worst = max(self.parity.values())
            products = f"{len(self.parity)} products of the first and the last layer"
            lines.append(f"parity  within {worst:.1e} of the largest output of BitLinear in numpy ({products})")
        return "\n".join(lines)


def _ignore(done: int, total: int) -> None:
    """The default of on_step: nothing is reported."""


def write_decoder(
    checkpoint: TernaryCheckpoint,
    folder: Path,
    *,
    head: Head = "int8",
    native: bool = True,
    git: Mapping[str, str | bool] | None = None,
    on_step: Callable[[int, int], None] = _ignore,
) -> DecoderReport:
    """Write a folder for onnxruntime-genai: model.onnx with model.onnx.data, genai_config.json, the tokenizer's files as they
    are, and the native library, which onnxruntime-genai loads from the model's folder alone.

    Tensors go to the file as they are read, so memory holds about the float32 embedding beyond what the reader takes.

    Args:
        checkpoint: what is read. folder: must not be there yet, or be empty. head: how embedding and head are kept, see
            DecoderGraph. native: False writes MatMulNBits of onnxruntime with 2 bits, to compare with. git: commit of the
            source tree, if known; it goes into the file's record. on_step: called with the number of steps done, and of all.

    Raises:
        DecoderError: the decoder cannot be expressed, a tensor does not fit, or the folder fails its check. OSError: the folder
        cannot be written. LibraryNotFoundError: native without a native library. What the checkpoint raises passes through.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DecoderError(f"output {folder} must not exist yet, or be an empty folder")
    library = get_library_path() if native else None
    tokenizer_files = _tokenizer_files(checkpoint.tokenizer_files)
    num_steps = checkpoint.config.num_layers + 3
    with whole_folder(folder) as partial:
        try:
            graph = _write_data(checkpoint, partial, head, native, lambda done: on_step(done, num_steps))
        except ValueError as error:
            raise DecoderError(str(error)) from error
        proto = helper.make_model(graph, opset_imports=_opsets(), ir_version=_IR_VERSION, producer_name="trix")
        for path in [*tokenizer_files, *([library] if library else [])]:
            shutil.copyfile(path, partial / path.name)
        parity = _check_projections(checkpoint, proto, partial) if native else {}
        record = FileRecord(
            task=DECODER,
            float32_bytes=num_parameters(checkpoint.config) * 4,
            config=asdict(checkpoint.config),
            context_length=checkpoint.config.max_position,
            activations=Activations(8, 0 if native else 128),
            export_parity=parity or None,
            provenance={
                "format": checkpoint.format,
                "sources": dict(checkpoint.sources),
                "head": head,
                "trix": metadata.version("trix"),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "git": dict(git) if git else None,
            },
        )
        helper.set_model_props(proto, record.to_properties())
        (partial / MODEL).write_bytes(proto.SerializeToString())
        config = genai_config(checkpoint.config, native)
        (partial / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        on_step(num_steps - 1, num_steps)
        _check_token(partial / MODEL, checkpoint.config, native)
        on_step(num_steps, num_steps)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    return DecoderReport(checkpoint.format, parity, sizes)


def genai_config(config: DecoderConfig, native: bool) -> dict[str, Any]:
    """What onnxruntime-genai reads of the model: names of inputs and outputs, special tokens, and how it searches.

    Where the checkpoint names no end token, onnxruntime-genai takes token 0 for it. Keys and values are written in place, into
    memory for max_length tokens, which a program sets lower than the context where that takes too much.

    The texts of a batch are padded at the end, as encode_batch of onnxruntime-genai does. Padding at the start, as transformers
    does, raises no error there, but changes what is written. Logits are for all tokens of a prompt: of one place alone,
    onnxruntime-genai would take the last, which for a shorter text is padding.
    """
    ends = list(config.eos_token_ids)
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
    tokens: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": pad}
    if config.bos_token_id is not None:
        tokens["bos_token_id"] = config.bos_token_id
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if native:
        options["custom_ops_library"] = LIBRARY_NAME
    decoder = {
        "session_options": options,
        "filename": MODEL,
        "head_size": config.head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": INPUTS,
        "outputs": OUTPUTS,
    }
    model = {"type": "llama", "context_length": config.max_position, "vocab_size": config.vocab_size, "decoder": decoder}
    search = {"do_sample": False, "max_length": config.max_position, "past_present_share_buffer": True}
    return {"model": model | tokens, "search": search}


def _tokenizer_files(paths: Iterable[Path]) -> list[Path]:
    files = list(paths)
    for path in files:
        if path.name in (MODEL, DATA, GENAI_CONFIG, LIBRARY_NAME):
            raise DecoderError(f"tokenizer file {path.name} must have another name than the files that are written")
    return files


def _opsets() -> list[onnx.OperatorSetIdProto]:
    versions = {"": _OPSET, MICROSOFT: 1, DOMAIN: OPSET_VERSION}
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _write_data(
    checkpoint: TernaryCheckpoint, folder: Path, head: Head, native: bool, on_step: Callable[[int], None]
) -> onnx.GraphProto:
    with (folder / DATA).open("wb") as file:
        graph = DecoderGraph(checkpoint, DataFile(file, DATA), head, native)
        graph.begin()
        on_step(1)
        for layer in range(checkpoint.config.num_layers):
            graph.add_layer(layer)
            on_step(layer + 2)
        return graph.finish()


def _check_projections(checkpoint: TernaryCheckpoint, proto: onnx.ModelProto, folder: Path) -> dict[str, float]:
    """The products of the first and of the last layer, as they are in the folder, against BitLinear in numpy.

    The tokens are random, one so small that BitLinear clamps its scale.
    """
    random = np.random.default_rng(0)
    errors = {}
    nodes = {node.name: node for node in proto.graph.node}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for layer in sorted({0, checkpoint.config.num_layers - 1}):
        for name, projections in PRODUCTS.items():
            product = nodes[f"layers.{layer}.{name}.out"]
            matrices = [checkpoint.ternary(f"layers.{layer}.{projection}") for projection in projections]
            x_TK = random.standard_normal((_PARITY_TOKENS, matrices[0].code_NK.shape[1]), dtype=np.float32)
            x_TK[0] *= np.float32(MIN_MAGNITUDE / 10)
            expected_TN = np.concatenate([bit_linear(x_TK, matrix.code_NK, matrix.scale) for matrix in matrices], axis=1)
            found_TN = _run_product(product, tensors, x_TK, folder)
            error_T = np.abs(found_TN - expected_TN).max(1) / np.maximum(np.abs(expected_TN).max(1), np.finfo(np.float32).tiny)
            errors[f"layers.{layer}.{name}"] = float(error_T.max())
            if not error_T.max() <= MAX_ERROR:
                rule = f"must be <= {MAX_ERROR:.0e} of the largest output"
                raise DecoderError(f"layers.{layer}.{name}: difference from BitLinear ({error_T.max():.1e}) {rule}")
    return errors


def bit_linear(
    x_TK: NDArray[np.float32], code_NK: NDArray[np.int8], scale: np.float32 | NDArray[np.float32]
) -> NDArray[np.float64]:
    """scale * m / 127 * sum_k round(x * (127 * (1 / m))) * code, m = max(max |x|, 1e-5) of a token; sums are exact. [T, N]."""
    largest_T1 = np.maximum(np.abs(x_TK).max(1, keepdims=True), np.float32(MIN_MAGNITUDE))
    q_TK = np.rint(x_TK * (np.float32(127) * (np.float32(1) / largest_T1))).astype(np.int32)
    dot_TN = np.stack([np.einsum("k,nk->n", q_K, code_NK, dtype=np.int64) for q_K in q_TK])
    return dot_TN * np.asarray(scale, np.float64) * (largest_T1 / 127.0)


def _run_product(
    product: onnx.NodeProto, tensors: Mapping[str, TensorProto], x_TK: NDArray[np.float32], folder: Path
) -> NDArray[np.float32]:
    """A node of the graph alone, on tokens [T, K]: [T, N]."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [product],
        "product",
        [value(product.input[0], TensorProto.FLOAT, [1, None, None])],
        [value(product.output[0], TensorProto.FLOAT, [1, None, None])],
        [tensors[name] for name in product.input[1:]],
    )
    proto = helper.make_model(graph, opset_imports=_opsets(), ir_version=_IR_VERSION)
    outputs: list[NDArray[np.float32]] = session_of(proto, folder, session_options()).run(None, {product.input[0]: x_TK[None]})
    return outputs[0][0]


def _check_token(path: Path, config: DecoderConfig, native: bool) -> None:
    """Raises DecoderError unless onnxruntime loads the file and answers to one token."""
    options = session_options() if native else ort.SessionOptions()
    options.log_severity_level = 3
    token = config.bos_token_id if config.bos_token_id is not None else 0
    feeds: dict[str, NDArray[Any]] = {
        name: np.array([[value]]) for name, value in (("input_ids", token), ("attention_mask", 1))
    }
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_size), np.float32)
    feeds |= {f"{PAST}.{layer}.{part}": empty for layer in range(config.num_layers) for part in ("key", "value")}
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        (logits,) = session.run(["logits"], feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise DecoderError(f"onnxruntime can't run the model: {' '.join(str(error).split())}") from error
    if logits.shape != (1, 1, config.vocab_size):
        raise DecoderError(f"shape of the logits {logits.shape} must be {(1, 1, config.vocab_size)}")
    if not np.isfinite(logits).all():
        num_bad = int((~np.isfinite(logits)).sum())
        raise DecoderError(f"logits of one token must be finite, {num_bad} of {logits.size} are not")
