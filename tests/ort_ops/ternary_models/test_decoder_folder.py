"""A ternary checkpoint of random weights as a folder: its products are BitLinear, its answers those of a decoder in numpy."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from random_decoders import BITNET, CONFIGS, RandomCheckpoint, bit_linear_reference, decode, quantised_activations

from ort_ops.external_data import check_external_data
from ort_ops.file_format import DECODER, FileRecord
from ort_ops.library import LIBRARY_NAME, get_library_path, session_options
from ort_ops.ternary_models import decoder_folder
from ort_ops.ternary_models.decoder_folder import DecoderError, write_decoder
from ort_ops.ternary_models.decoder_graph import PRODUCTS
from ort_ops.ternary_models.decoder_weights import int8_codes, int8_scales
from ort_ops.ternary_models.types import DecoderConfig, TernaryMatrix

pytestmark = pytest.mark.usefixtures("native_library")

CHECKPOINTS = {
    "bitnet": RandomCheckpoint(BITNET),
    "bitnet, not tied": RandomCheckpoint(replace(BITNET, is_head_tied=False), seed=1),
    "llama": RandomCheckpoint(CONFIGS["llama"], seed=2),
    "llama, tied, a scale per row": RandomCheckpoint(replace(CONFIGS["llama"], is_head_tied=True), seed=3, scale_per_row=True),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RandomCheckpoint, Path]:
    """A checkpoint, and its folder with a head in float32."""
    folder = tmp_path_factory.mktemp("written") / "decoder"
    write_decoder(CHECKPOINTS[request.param], folder, head="float32")
    return CHECKPOINTS[request.param], folder


def session_of(model: onnx.ModelProto | Path) -> ort.InferenceSession:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, session_options(intra_op_num_threads=1), providers=["CPUExecutionProvider"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def feeds(config: DecoderConfig, token_BT: np.ndarray, mask_BT: np.ndarray | None = None, past: Arrays | None = None) -> Arrays:
    empty = np.zeros((len(token_BT), config.num_key_value_heads, 0, config.head_size), np.float32)
    nothing = {f"past_key_values.{i}.{part}": empty for i in range(config.num_layers) for part in ("key", "value")}
    mask = np.ones(token_BT.shape, np.int64) if mask_BT is None else mask_BT
    return {"input_ids": token_BT, "attention_mask": mask} | (past or nothing)


def products_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name.removesuffix(".out"): node for node in model.graph.node if node.op_type == "TernaryMatMul"}


def test_each_product_alone_is_bit_linear(written: tuple[RandomCheckpoint, Path]) -> None:
    checkpoint, folder = written
    model = onnx.load(folder / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    products = products_of(model)
    assert len(products) == checkpoint.config.num_layers * len(PRODUCTS)
    random = np.random.default_rng(4)
    for name, node in products.items():
        layer, fused = name.rsplit(".", 1)
        matrices = [checkpoint.ternary(f"{layer}.{projection}") for projection in PRODUCTS[fused]]
        x = random.standard_normal((2, 9, matrices[0].code_NK.shape[1]), dtype=np.float32)
        x[0, :4] *= np.float32([[1e-6], [1e-5], [1e-9], [0]])
        x[1, 0, 7] = 1000
        value = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info(node.input[0], value, [None] * 3)],
            [helper.make_tensor_value_info(node.output[0], value, [None] * 3)],
            [constants[read] for read in node.input[1:]],
        )
        found = session_of(helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version))
        (y,) = found.run(None, {node.input[0]: x})
        expected = np.concatenate([bit_linear_reference(x, matrix) for matrix in matrices], axis=-1)
        largest = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(y - expected) <= 1e-6 * largest).all(), name
        assert (largest[0, :2] > 0).all()


def test_a_padded_batch_is_answered_as_by_the_decoder_in_numpy(written: tuple[RandomCheckpoint, Path]) -> None:
    """The decoder in numpy goes on from the input that each product had in onnxruntime: otherwise one step of the quantiser
    that differs would change all that follows. These steps are counted."""
    checkpoint, folder = written
    config = checkpoint.config
    model = onnx.load(folder / "model.onnx")
    input_of = {name: node.input[0] for name, node in products_of(model).items()}
    model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in set(input_of.values()))
    num_used_B = np.array([24, 17, 3])
    token_BT = np.random.default_rng(5).integers(0, config.vocab_size, (3, 24))
    is_used_BT = np.arange(24) < num_used_B[:, None]
    session = session_of(model)
    outputs = [value.name for value in session.get_outputs()]
    given = feeds(config, token_BT, is_used_BT.astype(np.int64))
    answers: Arrays = dict(zip(outputs, session.run(outputs, given), strict=True))

    counts = {"all": 0, "other": 0}
    fused_of = {projection: fused for fused, projections in PRODUCTS.items() for projection in projections}

    def product(name: str, x: np.ndarray) -> np.ndarray:
        layer, projection = name.rsplit(".", 1)
        x_there = answers[input_of[f"{layer}.{fused_of[projection]}"]]
        steps, steps_there = (quantised_activations(one)[0][is_used_BT] for one in (x, x_there))
        counts["all"] += steps.size
        counts["other"] += int((steps != steps_there).sum())
        assert (np.abs(steps - steps_there) <= 1).all(), name
        return bit_linear_reference(x_there, checkpoint.ternary(name))

    expected = decode(checkpoint, token_BT, num_used_B, product)[is_used_BT]
    assert np.abs(answers["logits"][is_used_BT] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert counts["other"] <= 1e-4 * counts["all"], counts
    plain = decode(checkpoint, token_BT, num_used_B, lambda name, x: bit_linear_reference(x, checkpoint.ternary(name)))
    if not counts["other"]:
        assert np.abs(answers["logits"][is_used_BT] - plain[is_used_BT]).max() <= 1e-4 * np.abs(expected).max()


def test_token_by_token_the_answers_are_those_of_the_whole(written: tuple[RandomCheckpoint, Path]) -> None:
    """As far as a step of the quantiser that differs lets them: far less than two other tokens change."""
    checkpoint, folder = written
    session = session_of(folder / "model.onnx")
    token_BT = np.random.default_rng(6).integers(0, checkpoint.config.vocab_size, (2, 20))
    (whole,) = session.run(["logits"], feeds(checkpoint.config, token_BT))
    present = [value.name for value in session.get_outputs()]
    answers, past = [], None
    for begin, end in [(0, 11), *((place, place + 1) for place in range(11, 20))]:
        given = feeds(checkpoint.config, token_BT[:, begin:end], np.ones((2, end), np.int64), past)
        logits, *kept = session.run(present, given)
        past = {name.replace("present", "past_key_values"): value for name, value in zip(present[1:], kept, strict=True)}
        answers.append(logits)
    difference = np.abs(np.concatenate(answers, axis=1) - whole).max() / np.abs(whole).max()
    other_BT = token_BT.copy()
    other_BT[:, 0] = (other_BT[:, 0] + 1) % checkpoint.config.vocab_size
    changed = np.abs(session.run(["logits"], feeds(checkpoint.config, other_BT))[0][:, -1] - whole[:, -1]).max()
    assert difference <= 0.05
    assert difference * 3 < changed / np.abs(whole).max()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(7).integers(0, BITNET.vocab_size, (2, 12))


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


class Rounded(RandomCheckpoint):
    """Embedding and head hold only values that the kind of head can hold."""

    def __init__(self, config: DecoderConfig, head: str) -> None:
        super().__init__(config)
        self._head = head

    def float32(self, name: str) -> np.ndarray:
        array = super().float32(name)
        if name not in ("embedding", "head"):
            return array
        if self._head == "float16":
            return array.astype(np.float16).astype(np.float32)
        scale = int8_scales(array)
        codes = np.concatenate(list(int8_codes(array, scale))).astype(np.float32) - 128
        return (codes * scale[..., None]).reshape(array.shape)


@pytest.mark.parametrize("name", ["bitnet", "llama"])
@pytest.mark.parametrize(("head", "limit"), [("int8", 0.015), ("float16", 1e-6)])
def test_other_heads_answer_as_one_in_float32_whose_values_they_hold(
    name: str, head: Any, limit: float, tokens: np.ndarray, tmp_path: Path
) -> None:
    """That in int8 computes with activations in int8, too."""
    checkpoint = Rounded(CONFIGS[name], head)
    for kind in (head, "float32"):
        write_decoder(checkpoint, tmp_path / kind, head=kind)
    found, expected = (
        session_of(tmp_path / kind / "model.onnx").run(["logits"], feeds(checkpoint.config, tokens))[0]
        for kind in (head, "float32")
    )
    assert relative_rms(found, expected) < limit


def test_a_tied_head_and_the_embedding_share_one_tensor_of_int8(tmp_path: Path) -> None:
    sizes = {}
    for is_tied in (True, False):
        folder = tmp_path / str(is_tied)
        write_decoder(RandomCheckpoint(replace(BITNET, is_head_tied=is_tied)), folder)
        sizes[is_tied] = (folder / "model.onnx.data").stat().st_size
    V, D = BITNET.vocab_size, BITNET.hidden_size
    assert 0 <= sizes[False] - sizes[True] - V * D * (1 + 4 / 32) <= 3 * 4096


@pytest.mark.parametrize("name", ["bitnet", "llama"])
def test_without_the_library_it_runs_in_two_bits_and_answers_alike(name: str, tokens: np.ndarray, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(CONFIGS[name])
    for native in (True, False):
        write_decoder(checkpoint, tmp_path / str(native), head="float32", native=native)
    assert LIBRARY_NAME not in names(tmp_path / "False")
    assert "custom_ops_library" not in (tmp_path / "False" / "genai_config.json").read_text()
    plain = ort.InferenceSession(tmp_path / "False" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = plain.run(["logits"], feeds(checkpoint.config, tokens))
    (expected,) = session_of(tmp_path / "True" / "model.onnx").run(["logits"], feeds(checkpoint.config, tokens))
    assert relative_rms(found, expected) < 0.05


def test_a_folder_holds_all_that_genai_needs_and_says_where_it_is_from(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(BITNET)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(b'{"version": "1.0"}\r\n')
    checkpoint.tokenizer_files = (tokenizer,)
    folder = tmp_path / "new" / "decoder"
    steps: list[tuple[int, int]] = []
    git: dict[str, str | bool] = {"commit": "abc", "is_dirty": False}
    report = write_decoder(checkpoint, folder, git=git, on_step=lambda *step: steps.append(step))
    assert names(folder) == sorted(["genai_config.json", LIBRARY_NAME, "model.onnx", "model.onnx.data", "tokenizer.json"])
    assert dict(report.file_bytes) == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert steps == [(done, 6) for done in range(1, 7)]
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert (folder / LIBRARY_NAME).read_bytes() == get_library_path().read_bytes()

    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY_NAME
    tokens = {name: config["model"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert tokens == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0}

    assert check_external_data(folder / "model.onnx").file_bytes == {"model.onnx.data": report.file_bytes["model.onnx.data"]}
    properties = session_of(folder / "model.onnx").get_modelmeta().custom_metadata_map
    record = FileRecord.from_properties(properties)
    assert (record.task, record.context_length) == (DECODER, BITNET.max_position)
    assert record.config == json.loads(json.dumps(vars(BITNET)))
    assert record.export_parity == dict(report.parity)
    assert 0 < max(report.parity.values()) <= 1e-6
    assert record.provenance is not None
    assert record.provenance["format"] == "random weights"
    assert record.provenance["sources"] == checkpoint.sources
    assert record.provenance["git"] == git
    num_weights = sum(
        np.prod(tensor.dims, dtype=np.int64)
        for tensor in onnx.load(folder / "model.onnx").graph.initializer
        if tensor.name.endswith("norm") or tensor.name == "embedding.codes"
    )
    layer_K = 256 * 256 * 2 + 256 * 64 * 2 + 256 * 384 * 3
    assert record.float32_bytes == 4 * (num_weights + 3 * layer_K)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_decoder(RandomCheckpoint(BITNET), tmp_path / folder)
    for name in ("model.onnx.data", "genai_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    graphs = [onnx.load(tmp_path / folder / "model.onnx", load_external_data=False).graph for folder in ("one", "two")]
    assert graphs[0] == graphs[1]


class Spoilt(RandomCheckpoint):
    """One tensor is another one."""

    def __init__(self, name: str, value: Any, config: DecoderConfig = BITNET) -> None:
        super().__init__(config)
        self._name, self._value = name, value

    def ternary(self, name: str) -> TernaryMatrix:
        return self._value if name == self._name else super().ternary(name)

    def float32(self, name: str) -> np.ndarray:
        return self._value if name == self._name else super().float32(name)


def of(**changes: int) -> RandomCheckpoint:
    return RandomCheckpoint(replace(BITNET, **changes))


NAN_NORM = np.ones(256, np.float32)
NAN_NORM[3] = np.nan
CODES = np.zeros((256, 256), np.int8)
REFUSALS: dict[str, tuple[RandomCheckpoint, dict[str, Any], str]] = {
    "shape of codes": (
        Spoilt("layers.1.o", TernaryMatrix(CODES[:255], np.float32(1))),
        {},
        r"layers\.1\.o: shape \(255, 256\) must be \(256, 256\)",
    ),
    "values of codes": (
        Spoilt("layers.1.o", TernaryMatrix(CODES + np.int8(2), np.float32(1))),
        {},
        r"layers\.1\.o: values \(2 to 2\) must be in \{-1, 0, 1\}",
    ),
    "values of codes in two bits": (
        Spoilt("layers.1.o", TernaryMatrix(CODES - np.int8(2), np.float32(1))),
        {"native": False},
        r"layers\.1\.o: values \(-2 to -2\) must be in \{-1, 0, 1\}",
    ),
    "shape of a scale": (
        Spoilt("layers.0.q", TernaryMatrix(CODES, np.ones(2, np.float32))),
        {},
        r"layers\.0\.q: shape of the scale \(2,\) must be \(\) or \(256,\)",
    ),
    "scale": (
        Spoilt("layers.0.q", TernaryMatrix(CODES, np.float32(np.inf))),
        {},
        r"layers\.0\.q: scale must be finite, 1 of 1",
    ),
    "norm": (Spoilt("layers.2.ffn_norm", NAN_NORM), {}, r"layers\.2\.ffn_norm: values must be finite, 1 of 256 are not"),
    "shape of a norm": (Spoilt("norm", NAN_NORM[:5]), {}, r"norm: shape \(5,\) must be \(256,\)"),
    "large for float16": (
        Spoilt("embedding", np.full((320, 256), 7e4, np.float32)),
        {"head": "float16"},
        r"embedding: largest value \(70000.0\) must be <= 65504.0 for a float16 head",
    ),
    "heads": (
        RandomCheckpoint(replace(BITNET, num_heads=7)),
        {},
        r"num_heads \(7\) must be a multiple of num_key_value_heads \(2\)",
    ),
    "size of a head": (RandomCheckpoint(replace(BITNET, head_size=12)), {}, r"head_size \(12\) must be a multiple of 8"),
    "positions": (
        RandomCheckpoint(replace(BITNET, max_position=2**40)),
        {},
        r"max_position \(1099511627776\) \* head_size \(\d+\) must be <= 134217728",
    ),
    "width for int8": (
        RandomCheckpoint(replace(BITNET, hidden_size=24)),
        {},
        r"hidden_size \(24\) must be a multiple of 32 for an int8 head; a float16 or float32 head takes any",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_checkpoint_leaves_nothing(case: str, tmp_path: Path) -> None:
    checkpoint, settings, text = REFUSALS[case]
    with pytest.raises(DecoderError, match=f"^{text}"):
        write_decoder(checkpoint, tmp_path / "decoder", **settings)
    assert names(tmp_path) == []


def test_a_wrong_product_or_answer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees what a fault of the graph, the library or the disk would give."""
    with monkeypatch.context() as patch:
        patch.setattr(decoder_folder, "MIN_MAGNITUDE", 1e-4)
        with pytest.raises(DecoderError, match=r"layers\.0\.qkv: difference from BitLinear \(.*\) must be <= 1e-06"):
            write_decoder(RandomCheckpoint(BITNET), tmp_path / "decoder")
    checkpoint = Spoilt("norm", np.full(256, 3e38, np.float32))
    with pytest.raises(DecoderError, match=r"logits of one token must be finite, .* of 320 are not"):
        write_decoder(checkpoint, tmp_path / "decoder", head="float32")
    assert names(tmp_path) == []


def test_a_folder_with_content_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    checkpoint = Spoilt("embedding", None)
    with pytest.raises(DecoderError, match=r"must not exist yet, or be an empty folder"):
        write_decoder(checkpoint, tmp_path)
    assert names(tmp_path) == ["mine.txt"]


def test_a_tokenizer_file_never_takes_the_place_of_a_written_one(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(BITNET)
    checkpoint.tokenizer_files = (tmp_path / "genai_config.json",)
    with pytest.raises(DecoderError, match=r"tokenizer file genai_config\.json must have another name"):
        write_decoder(checkpoint, tmp_path / "decoder")


KILLED = """
import os, signal, sys
from pathlib import Path
from random_decoders import BITNET, RandomCheckpoint
from ort_ops.ternary_models.decoder_folder import write_decoder
write_decoder(RandomCheckpoint(BITNET), Path("decoder"), on_step=lambda done, total: done == 3 and os.kill(os.getpid(), 9))
"""


def test_killed_half_way_there_is_no_folder_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, timeout=120)
    assert process.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".decoder.")
    assert (tmp_path / left / "model.onnx.data").stat().st_size > 0
    write_decoder(RandomCheckpoint(BITNET), tmp_path / "decoder")
    assert names(tmp_path) == ["decoder"]
