"""The bare loop: every row is used, in order, whatever the sizes of the parts; and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.superposition.config import SAEConfig
from trix.superposition.sae import RESTRAINTS, SparseAutoencoder, TopKSAE, load_sae, make_sae, save_sae, train_sae
from trix.superposition.sae.train import batches


def config(**changes: Any) -> SAEConfig:
    defaults = {"k": 16, "active": 2, "lr": 1e-2, "l1": 1e-3, "epochs": 2, "batch_size": 8, "architecture": "topk"}
    return SAEConfig(**(defaults | changes))


@given(sizes=st.lists(st.integers(0, 13), max_size=6), batch_size=st.integers(1, 9))
def test_batches_hold_every_row_once_in_order(sizes: list[int], batch_size: int) -> None:
    rows = torch.arange(sum(sizes)).unsqueeze(-1)
    found = list(batches(rows.split(sizes), batch_size))
    assert torch.equal(torch.cat([rows[:0], *found]), rows)
    assert all(len(batch) == batch_size for batch in found[:-1])
    assert all(0 < len(batch) <= batch_size for batch in found[-1:])


def test_training_explains_the_activations_better_and_ends_without_scales() -> None:
    torch.manual_seed(0)
    x = 4 * torch.randn(300, 3) @ torch.randn(3, 6) + 2
    sae = TopKSAE(6, 16, active=2)
    epochs = train_sae(sae, lambda: x.split(50), config(epochs=20))
    assert len(epochs) == 20
    assert epochs[-1]["reconstruction"] < epochs[0]["reconstruction"] / 2
    assert epochs[0]["active"] <= 2
    assert sae.input_scale == 1
    with torch.no_grad():
        assert (sae(x)[0] - x).square().sum() < 0.3 * (x - x.mean(0)).square().sum()


def test_the_sizes_of_the_parts_do_not_matter() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    weights = []
    for size in (100, 7):
        torch.manual_seed(1)
        sae = TopKSAE(6, 16, active=2)
        train_sae(sae, lambda size=size: x.split(size), config())
        weights.append(sae.W_dec)
    assert torch.equal(*weights)


def test_the_configuration_says_what_is_made() -> None:
    made = make_sae(6, config())
    assert isinstance(made, TopKSAE)
    assert (made.d_model, made.k, made.active) == (6, 16, 2)
    standard = make_sae(6, config(architecture="standard", l1=0.25))
    assert isinstance(standard, SparseAutoencoder)
    assert standard.l1 == 0.25
    with pytest.raises(ValueError, match=r"SAE architecture \('top'\) must be 'standard', 'topk'"):
        make_sae(6, config(architecture="top"))


def test_an_autoencoder_is_trained_once(tmp_path: Path) -> None:
    sae, x = TopKSAE(6, 16, active=2), torch.randn(20, 6)
    train_sae(sae, lambda: [x], config())
    save_sae(sae, tmp_path / "sae")
    for trained in (sae, load_sae(tmp_path / "sae")):
        before = trained.W_dec.clone()
        with pytest.raises(ValueError, match="training must start from a new autoencoder"):
            train_sae(trained, lambda: [x], config())
        assert torch.equal(trained.W_dec, before)


def test_what_cannot_be_trained_on_is_named() -> None:
    sae, x = TopKSAE(6, 16, active=2), torch.randn(20, 6)
    with pytest.raises(ValueError, match=r"k of the configuration \(17\) must be that of the autoencoder \(16\)"):
        train_sae(sae, lambda: [x], config(k=17))
    with pytest.raises(TypeError, match=r"shard_iter \(list_iterator\) must be a callable without arguments"):
        train_sae(sae, iter([x]), config())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"number of activations in epoch 1 \(0\) must be >= 1"):
        train_sae(sae, lambda: [], config())
    x[9, 0] = torch.nan
    with pytest.raises(ValueError, match=r"activations \(batch after 8 tokens of epoch 1\) must be finite"):
        train_sae(sae, lambda: [x], config())


@pytest.mark.parametrize("restraint", RESTRAINTS)
def test_a_control_keeps_what_it_must_and_learns_the_rest(restraint: str) -> None:
    torch.manual_seed(0)
    x = 4 * torch.randn(300, 3) @ torch.randn(3, 6) + 2
    sae = TopKSAE(6, 16, active=2).restrain(restraint)
    encoder, decoder = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    epochs = train_sae(sae, lambda: x.split(50), config(epochs=20, lr=0.1))
    assert epochs[-1]["reconstruction"] < epochs[0]["reconstruction"]
    now = {"encoder": sae.W_enc.detach(), "decoder": sae.W_dec.detach()}
    same = {
        part: torch.nn.functional.cosine_similarity(now[part].flatten(), start.flatten(), dim=0) > 1 - 1e-6
        for part, start in {"encoder": encoder, "decoder": decoder}.items()
    }
    assert same == {"encoder": restraint == "frozen_encoder", "decoder": restraint == "frozen_decoder"}
    cosine = torch.nn.functional.cosine_similarity(now["decoder"], decoder, dim=-1)
    if restraint == "soft_frozen_decoder":
        assert cosine.min() == pytest.approx(0.8, abs=1e-5)  # some would have gone further


def test_restraints_need_a_new_autoencoder_and_a_name_that_is_known() -> None:
    sae = TopKSAE(6, 16, active=2)
    with pytest.raises(ValueError, match=r"restraint \('frozen'\) must be one of frozen_decoder, soft_frozen_decoder"):
        sae.restrain("frozen")
    sae.start_from(torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"restraint \(frozen_decoder\) needs a new autoencoder"):
        sae.restrain("frozen_decoder")
