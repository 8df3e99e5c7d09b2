"""Autoencoders of other projects do here what they do there, by their formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trix.superposition.sae.exchange import from_dictionary_learning, load_sparsify

WIDTH, NUM_LATENTS, ACTIVE = 6, 10, 3


def weights(seed: int = 0) -> dict[str, Tensor]:
    """As linear layers have them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (10, 6), "encoder.bias": (10,), "W_dec": (10, 6), "b_dec": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tokens() -> Tensor:
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))


def top(pre: Tensor) -> Tensor:
    return torch.zeros_like(pre).scatter(1, pre.topk(ACTIVE).indices, 1.0) * pre.relu()


@pytest.fixture
def sparsify_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "layers.3"
    folder.mkdir()
    save_file(weights(), folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": 10, "k": ACTIVE, "d_in": WIDTH, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_sparsify(sparsify_folder: Path) -> None:
    w, x = weights(), tokens()
    z = top((x - w["b_dec"]) @ w["encoder.weight"].t() + w["encoder.bias"])
    x_hat, found = load_sparsify(sparsify_folder)(x)
    assert torch.allclose(found, z, atol=1e-5)
    assert torch.allclose(x_hat, z @ w["W_dec"] + w["b_dec"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, r"transcode of .* \(True\) must be False"),
        ({"skip_connection": True}, r"skip_connection of .* \(True\) must be False"),
        ({"activation": "groupmax"}, r"activation of .* \('groupmax'\) must be 'topk'"),
        ({"num_latents": 11}, r"shape of encoder.weight in .* \(\[10, 6\]\) must be \[11, 6\]"),
        ({"num_latents": 0, "expansion_factor": 10**9}, r"must be \[6000000000, 6\]"),
        ({"num_latents": "10"}, r"num_latents of .* \('10'\) must be a whole number >= 1"),
        ({"k": 0}, r"k of .* \(0\) must be a whole number >= 1"),
        ({"k": 11}, r"active \(11\) must be >= 1 and <= k \(10\)"),
    ],
)
def test_what_sparsify_does_and_we_do_not_is_refused(sparsify_folder: Path, changes: dict[str, Any], message: str) -> None:
    path = sparsify_folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_sparsify(sparsify_folder)


def of_dictionary_learning(name: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A state_dict of the class, and what it makes of the tokens."""
    w, x = weights(), tokens()
    decoder, centre = w.pop("W_dec"), w.pop("b_dec")
    pre = (x - centre) @ w["encoder.weight"].t() + w["encoder.bias"]
    state: dict[str, Any] = {**w, "decoder.weight": decoder.t().contiguous(), "b_dec": centre}
    if name == "AutoEncoder":
        state["bias"] = state.pop("b_dec")
        z = pre.relu()
    elif name == "AutoEncoderTopK":
        state |= {"k": torch.tensor(ACTIVE, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        z = top(pre)
    elif name == "BatchTopKSAE":
        state |= {"k": torch.tensor(ACTIVE, dtype=torch.int), "threshold": torch.tensor(0.7)}
        z = torch.where(pre > 0.7, pre, 0.0)
    else:
        threshold = torch.linspace(0.1, 2.0, NUM_LATENTS)
        state = {
            "W_enc": w["encoder.weight"].t().contiguous(),
            "b_enc": w["encoder.bias"],
            "W_dec": decoder,
            "b_dec": centre,
            "threshold": threshold,
        }
        pre = x @ state["W_enc"] + state["b_enc"]
        z = torch.where(pre > threshold, pre, 0.0)
    return state, z, z @ decoder + centre


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"])
def test_dictionary_learning(name: str) -> None:
    state, z, x_hat = of_dictionary_learning(name)
    ours, found = from_dictionary_learning(state, {"trainer": {"dict_class": name}})(tokens())
    assert torch.allclose(found, z, atol=1e-5)
    assert torch.allclose(ours, x_hat, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {}, r"trainer.dict_class \(None\) must be one of AutoEncoder, AutoEncoderTopK"),
        ({}, {"trainer": {"dict_class": "os.system"}}, r"trainer.dict_class \('os.system'\) must be one of"),
        ({"k": None}, None, r"weight k \(NoneType\) must be a tensor of 0 axes"),
        ({"encoder.bias": torch.zeros(9)}, None, r"b_enc \(torch.float32 \[9\]\) must be of shape \[10\]"),
        ({"b_dec": torch.full((6,), torch.nan)}, None, r"b_dec .* must be of shape \[6\], all of it finite numbers"),
        ({"decoder.weight": torch.zeros(6, 10, dtype=torch.int64)}, None, r"W_dec \(torch.int64"),
        ({"encoder.weight": torch.zeros(3)}, None, r"weight encoder.weight \(1 axes\) must be a tensor of 2 axes"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], config: dict[str, Any] | None, message: str) -> None:
    state = of_dictionary_learning("AutoEncoderTopK")[0] | changes
    with pytest.raises(ValueError, match=message):
        from_dictionary_learning(state, {"trainer": {"dict_class": "AutoEncoderTopK"}} if config is None else config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("AutoEncoderTopK", {"k": torch.tensor(2.5)}, r"weight k \(torch.float32\) must be an integer"),
        ("AutoEncoderTopK", {"k": torch.tensor(torch.inf)}, r"weight k \(torch.float32\) must be an integer"),
        ("JumpReluAutoEncoder", {"b_enc": torch.zeros(7)}, r"shape of b_enc \(\[7\]\) must be \[10\]"),
        ("JumpReluAutoEncoder", {"threshold": torch.zeros(9)}, r"shape of threshold \(\[9\]\) must be \[10\]"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    weights = {"W_enc": torch.randn(6, 10), "b_enc": torch.zeros(10), "W_dec": torch.randn(10, 6)}
    linear = {"encoder.weight": torch.randn(10, 6), "encoder.bias": torch.zeros(10), "decoder.weight": torch.randn(6, 10)}
    tensors = {**weights, **linear, "b_dec": torch.zeros(6), "threshold": torch.zeros(10), **changes}
    with pytest.raises(ValueError, match=message):
        from_dictionary_learning(tensors, {"trainer": {"dict_class": name}})
