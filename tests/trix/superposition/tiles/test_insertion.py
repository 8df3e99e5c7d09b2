"""A latent as a signature and as a steering vector, at equal KL."""

import copy

import pytest
import torch
import torch.nn.functional as F
from planted_sae import ReLUSAE
from small_dumps import trix_backend

from trix.nn import TriXBlock, TriXFFN
from trix.superposition.backends import Site, TriXBackend
from trix.superposition.tiles import insertion_against_steering, signature_of_latent

SITE = Site(1, "router_in")


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 27, (6, 20), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    return [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]


def sae_of(width: int = 32, num_latents: int = 6) -> ReLUSAE:
    torch.manual_seed(3)
    weight = F.normalize(torch.randn(num_latents, width), dim=-1)
    return ReLUSAE(weight.T, weight, torch.full((num_latents,), -0.5))


def layer_of(backend: TriXBackend) -> TriXFFN:
    block = backend.block(1)
    assert isinstance(block, TriXBlock)
    assert isinstance(block.ffn, TriXFFN)
    return block.ffn


def test_both_edits_have_the_same_kl_and_the_model_is_left_as_it_was() -> None:
    backend, sae = trix_backend(), sae_of()
    state = copy.deepcopy(backend.model.state_dict())
    found = insertion_against_steering(backend, SITE, sae, latent=2, tile=5, batches=batches)
    assert found.insertion.kl > 0
    assert found.steering.kl == pytest.approx(found.insertion.kl, rel=0.05)
    assert found.scale > 0
    for value, before in zip(backend.model.state_dict().values(), state.values(), strict=True):
        assert torch.equal(value, before)
    assert layer_of(backend)._forward_pre_hooks == {}


def test_figures_are_those_of_the_edited_model() -> None:
    backend, sae = trix_backend(), sae_of()
    found = insertion_against_steering(backend, SITE, sae, latent=2, tile=5, batches=batches)
    edited = trix_backend()
    layer_of(edited).insert_signature(5, signature_of_latent(sae.W_enc[:, 2], SITE))
    kl, active, tiles, losses = [], [], [], []
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            text = ids[: int(mask.sum())][None]
            with torch.no_grad():
                log_p, log_q = (F.log_softmax(one.model(text)[0, :-1], dim=-1) for one in (backend, edited))
            kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
            losses.append(-log_q.gather(1, text[0, 1:, None])[:, 0])
            active.append(sae.encode(backend.activations(text, None, [SITE])[SITE][0, :-1])[:, 2] > 0)
            sites = [Site(1, "tile")]
            tiles.append(torch.stack([one.activations(text, None, sites)[sites[0]][0, :-1] for one in (backend, edited)]))
    kl_N, active_N, tile_2N, loss_N = torch.cat(kl), torch.cat(active), torch.cat(tiles, dim=1), torch.cat(losses)
    assert 0 < active_N.sum() < len(active_N)
    assert found.insertion.kl == pytest.approx(float(kl_N.mean()), rel=1e-3)
    assert found.insertion.loss == pytest.approx(float(loss_N.mean()), rel=1e-4)
    assert found.insertion.kl_where_active == pytest.approx(float(kl_N[active_N].sum() / kl_N.sum()), rel=1e-3)
    assert found.active == pytest.approx(float(active_N.float().mean()))
    changed_N = tile_2N[0] != tile_2N[1]
    assert found.insertion.tiles_changed == pytest.approx(float(changed_N.float().mean()))
    assert found.insertion.changed_where_active == pytest.approx(float((changed_N & active_N).sum() / changed_N.sum()))
    assert found.claimed == pytest.approx(float((tile_2N[1] == 5).float().mean()))


def test_the_signature_claims_the_tokens_on_which_the_latent_is_active_sooner_than_others() -> None:
    found = insertion_against_steering(trix_backend(), SITE, sae_of(), latent=2, tile=5, batches=batches)
    assert found.claimed_where_active > 1.5 * found.active


def test_steering_adds_the_decoder_row_of_the_scale() -> None:
    backend, sae = trix_backend(), sae_of()
    found = insertion_against_steering(backend, SITE, sae, latent=2, tile=5, batches=batches)
    layer, vector = layer_of(backend), found.scale * sae.W_dec[2].detach()
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + vector, *inputs[1:]))
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches():
            mask = batch["attention_mask"].bool()
            log_q = F.log_softmax(backend.model(batch["input_ids"], mask_BT=mask), dim=-1)[:, :-1]
            handle.remove()
            log_p = F.log_softmax(backend.model(batch["input_ids"], mask_BT=mask), dim=-1)[:, :-1]
            handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + vector, *inputs[1:]))
            is_counted = mask[:, :-1] & mask[:, 1:]
            total += float((log_p.exp() * (log_p - log_q)).sum(dim=-1)[is_counted].sum())
            num_tokens += int(is_counted.sum())
    assert total / num_tokens == pytest.approx(found.steering.kl, rel=1e-3)


def test_the_signature_of_a_latent_has_the_signs_of_its_large_entries() -> None:
    row = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = signature_of_latent(1e-3 * row, SITE)
    assert set(found.tolist()) == {-1, 0, 1}
    assert ((found == 0) | (found == row.sign())).all()
    assert row.abs()[found != 0].min() > row.abs()[found == 0].max()
    assert 0.5 < float(found.abs().mean()) < 0.6  # as fresh signatures: P(|N(0, 0.5)| > 0.3) = 0.55


@pytest.mark.parametrize(
    ("backend", "site", "latent", "message"),
    [
        ({}, Site(1, "resid_pre"), 0, r"site \(resid_pre\.1\) must be router_in\.1"),
        ({"route_on": "context"}, SITE, 0, "layer 1 must be a TriXFFN that is routed on hidden states"),
        ({"kind": "sparse_lookup"}, SITE, 0, "layer 1 must be a TriXFFN"),
        ({}, SITE, 6, r"latent \(6\) must be >= 0 and < number of latents \(6\)"),
        ({}, Site(7, "router_in"), 0, r"layer \(7\) must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(backend: dict[str, object], site: Site, latent: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insertion_against_steering(trix_backend(**backend), site, sae_of(), latent, 0, batches)


def test_a_row_of_zeros_gives_no_signature() -> None:
    with pytest.raises(ValueError, match=r"size of the encoder row \(0\.0\) must be > 0"):
        signature_of_latent(torch.zeros(8), SITE)
