"""Files in GGUF: the very codes come back, rows of q and k in Hugging Face's order, and the rest is refused in one line."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ternary_folders import TinyModel, tiny_model

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.gguf_header import read_header
from ort_ops.ternary_models.reading import open_checkpoint
from ort_ops.ternary_models.tensor_shapes import float_shapes, ternary_shapes

gguf = pytest.importorskip("gguf", reason="files in GGUF need gguf")
ternary_gguf = pytest.importorskip("ternary_gguf", reason="needs gguf")
Kind = gguf.GGMLQuantizationType
MODEL = tiny_model("llama", is_head_tied=False)
SMALL = tiny_model("llama", num_layers=1)
DOWN = "blk.0.ffn_down.weight"


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_the_very_codes_come_back(tmp_path: Path, kind: str, is_tied: bool) -> None:
    model = tiny_model("llama", is_tied)
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", model, Kind[kind]))
    assert checkpoint.format == f"GGUF, {kind}"
    assert checkpoint.tokenizer_files == ()
    assert list(checkpoint.sources) == ["m.gguf"]
    expected = vars(model.config) | {"eos_token_ids": (2, 3), "norm_epsilon": pytest.approx(1e-5)}
    assert vars(checkpoint.config) == expected
    for name, (code, scale) in ternary_gguf.ternary_weights(model).items():
        matrix = checkpoint.ternary(name)
        np.testing.assert_array_equal(matrix.code_NK, code, strict=True)
        assert isinstance(matrix.scale, np.float32)
        assert matrix.scale == scale
    for name, values in model.floats.items():
        np.testing.assert_array_equal(checkpoint.float32(name), values, strict=True)


def quantised(code_NK: np.ndarray, scale_N: np.ndarray, kind: Any) -> tuple[np.ndarray, Any]:
    return gguf.quants.quantize((code_NK * scale_N[:, None]).astype(np.float32), kind), kind


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    code=hnp.arrays(np.int8, (256, 512), elements=st.integers(-1, 1), fill=st.integers(-1, 1)),
    scale=hnp.arrays(np.float16, 256, elements=st.floats(2.0**-10, 4, width=16), fill=st.just(np.float16(1))),
    kind=st.sampled_from(["TQ1_0", "TQ2_0"]),
)
def test_a_scale_per_row_and_blocks_of_zeros(tmp_path: Path, code: np.ndarray, scale: np.ndarray, kind: str) -> None:
    code[3], code[4, :256], code[5, 256:] = 0, 0, 0  # d is 0 there
    blocks = {DOWN: quantised(code, scale.astype(np.float32), Kind[kind])}
    matrix = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks=blocks)).ternary("layers.0.down")
    np.testing.assert_array_equal(matrix.code_NK, code)
    found = np.broadcast_to(matrix.scale, 256)
    is_used = code.any(axis=1)
    np.testing.assert_array_equal(found[is_used], scale.astype(np.float32)[is_used])
    assert (found > 0).all()


def test_a_matrix_of_zeros(tmp_path: Path) -> None:
    blocks = {DOWN: quantised(np.zeros((256, 512), np.int8), np.ones(256), Kind.TQ2_0)}
    matrix = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks=blocks)).ternary("layers.0.down")
    assert not matrix.code_NK.any()
    assert matrix.scale == 1


def test_codes_of_a_block_without_scale_are_zeros(tmp_path: Path) -> None:
    """Whatever stands there: d = 0 makes it 0."""
    stored, kind = quantised(np.ones((256, 512), np.int8), np.ones(256), Kind.TQ2_0)
    stored.reshape(256, 2, 66)[7, 1, -2:] = (0, 0x80)  # -0
    blocks = {DOWN: (stored, kind)}
    matrix = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks=blocks)).ternary("layers.0.down")
    assert matrix.code_NK[7, :256].all()
    assert not matrix.code_NK[7, 256:].any()
    assert matrix.scale == 1


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_tables_of_other_types(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", MODEL, table_kind=Kind[kind]))
    for name in ("embedding", "head"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(MODEL.floats[name], Kind[kind]), Kind[kind])
        np.testing.assert_array_equal(checkpoint.float32(name), expected)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K"])
def test_tables_as_llama_quantize_writes_them(tmp_path: Path, kind: str) -> None:
    """The package does not write these types: any bytes of theirs, the halves that are scales made small."""
    num_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    stored = np.random.default_rng(0).integers(0, 60, (SMALL.config.vocab_size, num_bytes), dtype=np.uint8)
    blocks = {"token_embd.weight": (stored, Kind[kind])}
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks=blocks))
    np.testing.assert_array_equal(checkpoint.float32("embedding"), gguf.quants.dequantize(stored, Kind[kind]))


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda about: about.__delitem__(name)


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda about: about.__setitem__(name, value)


SETTING_REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no setting": (without("llama.block_count"), "m.gguf must hold llama.block_count"),
    "a text": (changed("llama.block_count", "1"), "llama.block_count of m.gguf ('1') must be a whole number from 1 to 1024"),
    "more layers": (changed("llama.block_count", 2), "must hold the tensor blk.1.attn_norm.weight"),
    "scaled rotation": (changed("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type of m.gguf ('yarn') must be none"),
    "a factor alone": (changed("llama.rope.scaling.factor", 4.0), "llama.rope.scaling.factor of m.gguf (4.0) must be 1"),
    "experts": (changed("llama.expert_count", 8), "llama.expert_count of m.gguf (8) must be 0"),
    "a part of the head rotated": (changed("llama.rope.dimension_count", 32), "rope.dimension_count of m.gguf (32) must be 64"),
    "heads": (changed("llama.attention.head_count", 3), "attention heads (3) must be a multiple of key-value heads (2)"),
    "width": (changed("llama.feed_forward_length", 256), "shape of blk.0.ffn_gate.weight (512, 256) must be (256, 256)"),
    "epsilon": (changed("llama.attention.layer_norm_rms_epsilon", 0.0), "(0.0) must be a number > 0 that float32 holds"),
    "token": (changed("tokenizer.ggml.eos_token_id", 96), "tokenizer.ggml.eos_token_id of m.gguf (96) must be a whole number"),
    "alignment": (changed("general.alignment", 0), "general.alignment (0) must be from 1 to 65536"),
}


@pytest.mark.parametrize("case", SETTING_REFUSALS)
def test_refuses_settings(tmp_path: Path, case: str) -> None:
    change, text = SETTING_REFUSALS[case]
    about = ternary_gguf.gguf_settings(SMALL)
    change(about)
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, settings=about)
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(path)
    assert text in str(failure.value)


def zeros(*shape: int) -> tuple[np.ndarray, Any]:
    return np.zeros(shape, np.float32), Kind.F32


def as_type(kind: str) -> tuple[np.ndarray, Any]:
    return gguf.quants.quantize(np.ones((256, 512), np.float32), Kind[kind]), Kind[kind]


TENSOR_REFUSALS: dict[str, tuple[str, tuple[np.ndarray, Any], str]] = {
    "fallback type": (DOWN, as_type("Q4_0"), f"type of {DOWN} (Q4_0) must be TQ1_0 or TQ2_0"),
    "dense": (DOWN, zeros(256, 512), f"type of {DOWN} (F32) must be TQ1_0 or TQ2_0"),
    "shape": (
        DOWN,
        quantised(np.ones((256, 256), np.int8), np.ones(256), Kind.TQ2_0),
        f"shape of {DOWN} (256, 256) must be (256, 512)",
    ),
    "type of a table": (
        "token_embd.weight",
        (np.zeros((96, 256), np.int8), Kind.I8),
        "type of token_embd.weight (I8) must be F32 or F16",
    ),
    "scaled rotation": (
        "rope_freqs.weight",
        zeros(32),
        "a tensor that this decoder does not have: scaled rotations are unknown",
    ),
    "bias": ("blk.0.attn_q.bias", zeros(256), "holds 'blk.0.attn_q.bias', a tensor that this decoder does not have"),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_refuses_tensors(tmp_path: Path, case: str) -> None:
    name, block, text = TENSOR_REFUSALS[case]
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks={name: block})
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(path)
    assert text in str(failure.value)


def test_scales_that_vary_along_k_are_refused(tmp_path: Path) -> None:
    """So a model that was not ternary before it was quantised is told from one that was."""
    dense = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    blocks = {DOWN: (gguf.quants.quantize(dense, Kind.TQ2_0), Kind.TQ2_0)}
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks=blocks))
    with pytest.raises(CheckpointError, match=rf"{DOWN}: scales of row 0 vary along K \(\d.* to \d.*\)"):
        checkpoint.ternary("layers.0.down")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_must_be_numbers_above_0(tmp_path: Path, value: float) -> None:
    stored, kind = quantised(np.ones((256, 512), np.int8), np.ones(256), Kind.TQ1_0)
    stored.reshape(256, 2, 54)[5, 1, -2:] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks={DOWN: (stored, kind)}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}: scales of row 5 \(.*\) must be >= 0 and finite"):
        checkpoint.ternary("layers.0.down")


def test_the_code_3_is_refused(tmp_path: Path) -> None:
    stored, kind = quantised(np.ones((256, 512), np.int8), np.ones(256), Kind.TQ2_0)
    stored[9, 66 + 32 + 4] |= 0b1100  # second block, second half, byte 4, field 1
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, blocks={DOWN: (stored, kind)}))
    with pytest.raises(
        CheckpointError, match=rf"{DOWN}: value \[9, {256 + 128 + 32 + 4}\] must have the code 0, 1 or 2, it has 3"
    ):
        checkpoint.ternary("layers.0.down")


@pytest.mark.parametrize("name", ["norm", "embedding"])
def test_floats_must_be_finite(tmp_path: Path, name: str) -> None:
    model = TinyModel("llama", SMALL.config, SMALL.masters, SMALL.floats | {name: SMALL.floats[name] * np.float32(np.nan)})
    checkpoint = open_checkpoint(ternary_gguf.write_gguf(tmp_path / "m.gguf", model))
    with pytest.raises(CheckpointError, match=r"weight must be finite: of \d+ values \d+ are NaN or infinite"):
        checkpoint.float32(name)


def test_bitnet_is_refused_for_its_activation(tmp_path: Path) -> None:
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, architecture="bitnet")
    with pytest.raises(CheckpointError, match=r"\('bitnet'\) must be llama: the file does not say whether it means SiLU"):
        open_checkpoint(path)
    path = ternary_gguf.write_gguf(tmp_path / "n.gguf", SMALL, architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"general.architecture of n.gguf \('qwen2'\) must be llama"):
        open_checkpoint(path)


# What follows is written by hand: the package writes no such files.


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def head(num_tensors: int, num_values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values)


def tensor_entry(name: str, kind: int, *shape: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, 0)


def test_i2_s_is_refused_and_names_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(head(1, 0) + tensor_entry("blk.0.attn_q.weight", 36, 256, 256) + bytes(70000))
    with pytest.raises(CheckpointError, match=r"type of 'blk.0.attn_q.weight' \(I2_S\) .* Hugging Face folder"):
        open_checkpoint(path)


def test_lists_are_skipped_and_values_read(tmp_path: Path) -> None:
    numbers = b"".join(text(f"n{kind}") + struct.pack(f"<I{form}", kind, 1) for kind, form in enumerate("BbHhIi"))
    lists = text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0, 1, 2) + text("tokens") + struct.pack("<IIQ", 9, 8, 2)
    content = head(1, 9) + numbers + lists + text("a") + text("") + text("name") + struct.pack("<I", 8) + text("ä")
    (tmp_path / "m.gguf").write_bytes(content + tensor_entry("w", 0, 2, 3))
    header = read_header(tmp_path / "m.gguf")
    assert header.values == {f"n{kind}": 1 for kind in range(6)} | {"name": "ä"}
    end = len(content) + len(tensor_entry("w", 0, 2, 3))
    assert header.tensors == {"w": (0, (2, 3), -(-end // 32) * 32)}


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"first bytes \(b''\) must be b'GGUF'"),
    "another format": (b"PK\3\4" + bytes(100), r"first bytes \(b'PK\\x03\\x04'\) must be b'GGUF'"),
    "magic alone": (b"GGUF", "must hold its whole header"),
    "old version": (head(0, 0, version=1), r"GGUF version \(1\) must be 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"GGUF version \(50331648\) must be 2 or 3"),
    "more values than bytes": (head(0, 2**60), "must hold its whole header"),
    "more tensors than bytes": (head(2**60, 0), "must hold its whole header"),
    "a long text": (head(0, 1) + struct.pack("<Q", 2**60), r"length of a text \(1152921504606846976\) must be <= 65536"),
    "a long list": (head(0, 1) + text("a") + struct.pack("<IIQ", 9, 0, 2**60), "must hold its whole header"),
    "a long list of texts": (head(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**60), "must hold its whole header"),
    "lists in lists": (
        head(0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1),
        r"values of a list \(9\) must be a number or a text",
    ),
    "unknown value": (head(0, 1) + text("a") + struct.pack("<I", 13), r"type of a value \(13\) must be one of GGUF's"),
    "value twice": (head(0, 2) + 2 * (text("a") + struct.pack("<IB", 0, 1)), "'a' must occur once in the header"),
    "tensor twice": (head(2, 0) + 2 * tensor_entry("w", 0, 1), "tensor 'w' must occur once in the header"),
    "dimensions": (head(1, 0) + tensor_entry("w", 0, 1, 1, 1, 1, 1), r"dimensions of a tensor \(5\) must be from 1 to 4"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refuses_headers(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL)
    whole = path.read_bytes()
    for length in (len(whole) - 5000, len(whole) // 2, 3000, 500, 30):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut off or damaged"):
            open_checkpoint(path)


def test_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    about = ternary_gguf.gguf_settings(SMALL)
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL, settings=about)
    entry = tensor_entry("token_embd.weight", 0, 96, 256)[:-8]
    content = path.read_bytes()
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, tensor_entry("token_embd.weight", 0, 2**62, 256)[:-8]))
    with pytest.raises(CheckpointError, match=r"rows of token_embd.weight \(4611686018427387904\) must be <= 16777216"):
        open_checkpoint(path)


@pytest.mark.parametrize("seed", range(8))
def test_changed_files_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    """Nothing else is raised, and whatever is read is ternary and finite. Most changes are in the header."""
    rng = np.random.default_rng(seed)
    path = ternary_gguf.write_gguf(tmp_path / "m.gguf", SMALL)
    honest = path.read_bytes()
    num_read = 0
    for _ in range(100):
        content = bytearray(honest)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(3500 if rng.random() < 0.7 else len(content)))
            if rng.random() < 0.5:
                content[place] = int(rng.choice([0, 1, 2, 127, 255, rng.integers(256)]))
            elif rng.random() < 0.5:
                content[place : place + 8] = int(rng.choice([0, 1, 2**31, 2**40, 2**62])).to_bytes(8, "little")
            else:
                del content[place : place + int(rng.integers(1, 300))]
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
            for name in ternary_shapes(checkpoint.config):
                assert set(np.unique(checkpoint.ternary(name).code_NK)) <= {-1, 0, 1}
            for name in float_shapes(checkpoint.config):
                assert np.isfinite(checkpoint.float32(name)).all()
        except CheckpointError:
            continue
        num_read += 1
    assert 0 < num_read < 100
