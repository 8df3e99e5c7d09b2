"""Autoencoders to compare with: what stays random, that seeds decide alone, and what does not fit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trix.superposition.evaluation.controls import new_sae, train_steps
from trix.superposition.sae import RESTRAINTS, SAE, TopKSAE

FEATURES_KD = torch.nn.functional.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(3)), dim=-1)


def small() -> SAE:
    return TopKSAE(16, 32, active=3, dead_window=400)


def planted(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums of three of 24 directions."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        z = torch.zeros(200, 24).scatter(1, torch.rand(200, 24, generator=generator).topk(3).indices, 1.0)
        x = (z * torch.rand(200, 24, generator=generator).add(0.5)) @ FEATURES_KD
        yield x, x


def trained(restraint: str | None, seed: int = 0, steps: int = 200) -> tuple[SAE, SAE]:
    """An autoencoder as it was made, and after training."""
    sae = new_sae(small, seed, restraint)
    start = new_sae(small, seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    return start, train_steps(sae, planted(), steps, optimizer)


def error(sae: SAE) -> float:
    x, _ = next(planted(7))
    with torch.no_grad():
        return float((x - sae(x)[0]).square().sum() / (x - x.mean(dim=0)).square().sum())


def test_a_seed_decides_alone_and_the_global_state_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = new_sae(small, 1), new_sae(small, 1), new_sae(small, 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_controls_keep_what_they_must_and_lose_to_what_is_trained() -> None:
    controls = {restraint: trained(restraint) for restraint in RESTRAINTS}
    start, free = trained(None)
    scale = {name: sae.W_dec.norm(dim=-1).mean() for name, (_, sae) in controls.items()}
    assert torch.allclose(controls["frozen_decoder"][1].W_dec / scale["frozen_decoder"], start.W_dec, atol=1e-5)
    cosine = torch.cosine_similarity(controls["soft_frozen_decoder"][1].W_dec, start.W_dec)
    assert 0.8 - 1e-4 < cosine.min() < 0.95
    assert torch.allclose(torch.cosine_similarity(controls["frozen_encoder"][1].W_enc, start.W_enc, dim=0), torch.ones(32))
    assert torch.cosine_similarity(free.W_dec, start.W_dec).min() < 0.8
    assert error(free) < 0.8 * min(error(sae) for _, sae in controls.values())
    assert free.input_scale == 1
    assert not free.training


def test_the_schedule_is_stepped_and_progress_sees_every_batch() -> None:
    sae = new_sae(small, 0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1.0)
    seen: list[int] = []

    def track(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            seen.append(len(batch[0]))
            yield batch

    before = new_sae(small, 0)
    train_steps(sae, planted(), 2, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0), track=track)
    assert seen == [200, 200]
    assert torch.allclose(sae.W_dec * sae.W_dec.norm(dim=-1, keepdim=True).reciprocal(), before.W_dec, atol=1e-6)


def test_what_does_not_fit_is_named() -> None:
    sae = new_sae(small, 0)
    optimizer = torch.optim.Adam(sae.parameters())
    with pytest.raises(ValueError, match=r"num_steps \(0\) must be >= 1"):
        train_steps(sae, planted(), 0, optimizer)
    with pytest.raises(ValueError, match=r"number of batches \(1\) must be >= num_steps \(3\)"):
        train_steps(sae, [next(planted())], 3, optimizer)
    with pytest.raises(ValueError, match="this one was trained before"):
        train_steps(sae, planted(), 1, optimizer)
    with pytest.raises(ValueError, match="restraint"):
        new_sae(small, 0, "frozen")
    wild = new_sae(small, 0)
    with pytest.raises(ValueError, match=r"loss of the last step \(nan\) must be finite"):
        train_steps(wild, planted(), 3, torch.optim.SGD(wild.parameters(), lr=float("inf")))
