"""Autoencoders as files: the same one comes back, SAELens' keys are there, and files that are not what they say are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_autoencoders import NUM_LATENTS, SETTINGS, WIDTH, small_autoencoder

from trix.superposition.sae import latents_from_shard, load_sae, save_sae
from trix.superposition.sae.load import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sae(small_autoencoder("topk"), tmp_path / "sae")
    return tmp_path / "sae"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_autoencoder_comes_back(name: str, tmp_path: Path) -> None:
    sae = small_autoencoder(name)
    save_sae(sae, tmp_path / "sae_weights.pt", {"site": "resid_pre"})
    again = load_sae(tmp_path / "sae_weights.pt", WIDTH, NUM_LATENTS)
    assert type(again) is type(sae)
    assert again.settings() == sae.settings()
    x = torch.randn(50, WIDTH)
    with torch.no_grad():
        for ours, its in zip(again(x), sae(x), strict=True):
            assert torch.allclose(ours, its, atol=1e-5)
    assert json.loads((tmp_path / "sae_weights.pt" / CONFIG_FILE).read_text())["metadata"]["trix"]["site"] == "resid_pre"


@pytest.mark.parametrize("name", SETTINGS)
def test_saving_leaves_the_autoencoder_as_it_was(name: str, tmp_path: Path) -> None:
    sae = small_autoencoder(name)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    save_sae(sae, tmp_path / "sae")
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


def test_what_was_trained_with_a_threshold_is_a_jumprelu_to_saelens(tmp_path: Path) -> None:
    for name, theirs in {"batch_topk": "jumprelu", "matryoshka": "jumprelu", "transcoder": "jumprelu_transcoder"}.items():
        sae = small_autoencoder(name)
        save_sae(sae, tmp_path / name)
        config = json.loads((tmp_path / name / CONFIG_FILE).read_text())
        assert config["architecture"] == theirs
        tensors = load_file(tmp_path / name / WEIGHTS_FILE)
        assert tensors["threshold"].shape == (NUM_LATENTS,)
        x = torch.randn(30, WIDTH)
        centre = tensors["b_dec"] if config["apply_b_dec_to_input"] else 0.0
        pre = (x - centre) @ tensors["W_enc"] + tensors["b_enc"]
        z = torch.where(pre > tensors["threshold"], pre, 0.0).relu()
        assert torch.allclose(z, sae.encode(x), atol=1e-4)


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu"])
def test_files_without_our_entry_are_read_by_their_architecture(name: str, tmp_path: Path) -> None:
    sae = small_autoencoder(name)
    save_sae(sae, tmp_path / "sae")
    edit_config(tmp_path / "sae", metadata={"sae_lens_version": "6.0.0"})
    again = load_sae(tmp_path / "sae")
    assert type(again) is type(sae)
    x = torch.randn(50, WIDTH)
    assert torch.allclose(again.encode(x), sae.encode(x), atol=1e-5)


def test_scaling_by_the_norms_of_the_decoder_is_folded_in(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    norm = torch.rand(NUM_LATENTS) + 0.5
    tensors["W_dec"] = (tensors["W_dec"] / tensors["W_dec"].norm(dim=1, keepdim=True)) * norm[:, None]
    save_file(tensors, folder / WEIGHTS_FILE)
    edit_config(folder, rescale_acts_by_decoder_norm=True)
    x = torch.randn(50, WIDTH)
    scaled = (((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norm).relu()
    kept = torch.zeros_like(scaled).scatter(1, scaled.topk(3).indices, 1.0)
    expected = (scaled * kept / norm) @ tensors["W_dec"] + tensors["b_dec"]
    assert torch.allclose(load_sae(folder)(x)[0], expected, atol=1e-5)


def test_an_input_that_is_not_centred_is_folded_in(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit_config(folder, apply_b_dec_to_input=False)
    x = torch.randn(50, WIDTH)
    pre = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    z = torch.zeros_like(pre).scatter(1, (idx := pre.topk(3).indices), pre.gather(1, idx))
    assert torch.allclose(load_sae(folder).encode(x), z, atol=1e-5)


def test_latents_of_a_shard_do_not_depend_on_the_batch(folder: Path) -> None:
    sae, x = load_sae(folder), torch.randn(23, WIDTH)
    assert torch.equal(latents_from_shard(sae, x, batch=5), latents_from_shard(sae, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 7}, r"shape of W_\w+ in .* must be \["),
        ({"d_sae": 10**9}, r"must be \["),
        ({"d_sae": "10"}, r"d_sae of .* \('10'\) must be a whole number >= 1"),
        ({"d_in": True}, r"d_in of .* \(True\) must be a whole number"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations of .* \('layer_norm'\) must be 'none'"),
        (
            {"metadata": None, "architecture": "gated"},
            r"architecture of .* \('gated'\) must be one of standard, topk, jumprelu",
        ),
        ({"metadata": None, "k": 99}, r"active \(99\) must be >= 1 and <= k \(10\)"),
        ({"metadata": {"trix": {"architecture": "os.system", "settings": {}}}}, r"SAE architecture \('os.system'\)"),
        ({"metadata": {"trix": {"architecture": "topk", "settings": {"actve": 3}}}}, r"did you mean active\?"),
        ({"metadata": None, "architecture": ["topk"]}, r"architecture of .* \(\['topk'\]\) must be one of standard, topk"),
        (
            {"metadata": {"trix": {"architecture": "topk", "settings": {"active": 3, "d_out": 10**15}}}},
            r"d_out of .* \(1000000000000000\) must be the width of W_dec \(6\)",
        ),
        ({"metadata": {"trix": {"architecture": "topk", "settings": {"active": 2.5}}}}, r"active \(2\.5\) must be an int"),
        (
            {"metadata": {"trix": {"architecture": "topk", "settings": {"active": 3, "aux_k": "1"}}}},
            r"aux_k \('1'\) must be an",
        ),
        ({"metadata": {"trix": {"architecture": "topk", "settings": {"active": 3, "dead_window": 0.5}}}}, r"must be an int"),
        ({"metadata": {"trix": {"architecture": "jumprelu", "settings": {}}}}, r"must hold a threshold for each latent"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k of .* \(10\) must be the one that is asked for \(11\)"):
        load_sae(folder, k=11)
    torch.save(small_autoencoder("topk").state_dict(), tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"pickles \(\.pt, \.bin\) are not read"):
        load_sae(tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt must be a folder"):
        save_sae(small_autoencoder("topk"), tmp_path / "old.pt")
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-8])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_sae(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"cannot be read: No such file"):
        load_sae(folder)
    (folder / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must be JSON"):
        load_sae(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="must be a folder with"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": object()}, r"metadata must be plain values: Object of type object is not JSON serializable"),
        ({"loss": float("nan")}, r"metadata must be plain values: Out of range float"),
        ({"architecture": "gpt2"}, r"metadata key \('architecture'\) must be another one than architecture and settings"),
        ({"settings": {}}, r"metadata key \('settings'\) must be another one"),
    ],
)
def test_metadata_that_cannot_be_kept_is_refused_before_anything_is_written(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_sae(small_autoencoder("topk"), tmp_path / "new", metadata)
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_neither_written_nor_read(folder: Path, tmp_path: Path) -> None:
    sae = small_autoencoder("topk")
    with torch.no_grad():
        sae.b_dec[0] = torch.nan
    with pytest.raises(ValueError, match=r"weight b_dec \(1 values that are not\) must be finite"):
        save_sae(sae, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["b_enc"][2] = torch.inf
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="must hold finite floating-point numbers"):
        load_sae(folder)
