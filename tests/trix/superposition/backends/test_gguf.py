"""GGUF files: a small one with quantized weights becomes a folder, once, with the numbers that the file stands for."""

import hashlib
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

import numpy as np
import torch

from trix.superposition.backends import HFCausalLM, convert_gguf

WIDTH, LAYERS, HIDDEN, HEADS = 64, 2, 96, 2
LETTERS = "abcdefgh "


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama over a few letters, its matrices in Q8_0; returns what they stand for."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<end>", *LETTERS.replace(" ", "Ġ"), "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd.weight": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (WIDTH, HIDDEN)
    draw, found = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quants.quantize(draw.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        found[name] = gguf.quants.dequantize(stored, kind)
    norms = ["output_norm", *(f"blk.{layer}.{name}_norm" for layer in range(LAYERS) for name in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def test_the_folder_holds_the_numbers_of_the_file_and_is_made_once(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = convert_gguf(path, tmp_path / "cache", sha256=digest.upper())
    assert folder == tmp_path / "cache" / f"tiny-fp32-{digest[:16]}"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    backend = HFCausalLM.from_pretrained(str(folder), dtype="fp32", device_map="cpu")
    state = backend.model.state_dict()
    for layer in range(LAYERS):
        for ours, theirs in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            expected = torch.from_numpy(weights[f"blk.{layer}.{ours}.weight"])
            assert torch.equal(state[f"model.layers.{layer}.{theirs}.weight"], expected)
    assert torch.equal(state["lm_head.weight"], torch.from_numpy(weights["token_embd.weight"]))  # tied: the file has none
    tokens = backend.tokenize(["abc abc", "h"], 8)
    assert backend.tokenizer.decode(tokens["input_ids"][0]) == "abc abc"
    assert int(tokens["attention_mask"][0].sum()) == 5  # "ab" is one token
    assert backend.forward_hidden(**tokens, layer=1).isfinite().all()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(path, tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    write_gguf(path, seed=1)
    assert convert_gguf(path, tmp_path / "cache") != folder


def test_a_folder_that_reads_back_as_another_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(ValueError, match=r"weights of .*tiny.gguf \(.*weight and others\) must be the same"):
        convert_gguf(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, share: float) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(int(share * len(whole)), 4)])
    with pytest.raises(ValueError, match=r"tiny.gguf must be a whole GGUF file of a kind that transformers reads"):
        convert_gguf(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_files_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError):
        convert_gguf(path, tmp_path / "cache")
    path.write_bytes(b"PK\x03\x04 a wheel")
    with pytest.raises(ValueError, match=r"model.gguf: first bytes \(b'PK\\x03\\x04'\) must be b'GGUF'"):
        convert_gguf(path, tmp_path / "cache")
    path.write_bytes(b"GGUF, but not really")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"SHA-256 \({digest}\) must be {'0' * 64}"):
        convert_gguf(path, tmp_path / "cache", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"dtype \('int8'\) must be one of bf16, fp16, fp32"):
        convert_gguf(path, tmp_path / "cache", dtype="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"GGUF files need accelerate: pip install 'trix\[gguf\]'"):
        convert_gguf(path, tmp_path / "cache")
