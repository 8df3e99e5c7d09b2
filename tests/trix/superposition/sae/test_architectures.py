"""What every architecture keeps to: planted features are found, scales fold away, files give the same autoencoder back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trix.superposition.sae import (
    ARCHITECTURES,
    SAE,
    BatchTopKSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SparseAutoencoder,
    TopKSAE,
    Transcoder,
    geometric_median,
)
from trix.superposition.sae.train import take_step

WIDTH, NUM_FEATURES, ACTIVE = 32, 48, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.02},
    "topk": {"active": ACTIVE},
    "batch_topk": {"active": ACTIVE},
    "jumprelu": {"l0": 0.01, "bandwidth": 0.3, "first_threshold": 0.3},
    "matryoshka": {"active": ACTIVE, "prefixes": [24, 64]},
    "transcoder": {"active": ACTIVE, "d_out": 24},
}


def make(name: str, k: int = 64, **settings: Any) -> SAE:
    torch.manual_seed(0)
    return ARCHITECTURES.make(name, WIDTH, k, arguments={**SETTINGS[name], **settings})


def planted(num_tokens: int, seed: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Sums of ACTIVE of NUM_FEATURES random directions, around a mean; and the directions, of norm 1."""
    directions = torch.nn.functional.normalize(
        torch.randn(NUM_FEATURES, width, generator=torch.Generator().manual_seed(7)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_tokens, NUM_FEATURES, generator=generator).topk(ACTIVE).indices
    strength = torch.zeros(num_tokens, NUM_FEATURES).scatter_(
        1, chosen, 1 + torch.rand(num_tokens, ACTIVE, generator=generator)
    )
    return 5 * (strength @ directions) + 3.0, directions


def trained(sae: SAE, steps: int = 400, lr: float = 5e-3) -> SAE:
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    for step in range(steps):
        x = planted(256, step)[0]
        target = planted(256, step, sae.d_out)[0]
        if step == 0:
            sae.start_from(x, target)
        take_step(sae, optimizer, x, target)
    return sae


def explained(sae: SAE) -> float:
    x, target = planted(2000, 10_000)[0], planted(2000, 10_000, sae.d_out)[0]
    with torch.no_grad():
        return 1 - float((sae(x)[0] - target).square().sum() / (target - target.mean(0)).square().sum())


def test_every_registered_architecture_is_tested_here() -> None:
    assert set(SETTINGS) == set(ARCHITECTURES.names)


@pytest.mark.parametrize("name", ["standard", "topk", "batch_topk", "jumprelu", "matryoshka"])
def test_planted_features_are_found(name: str) -> None:
    sae = trained(make(name))
    directions = planted(1, 0)[1]
    cosine = directions @ torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).t()
    control = directions @ make(name).W_dec.detach().t()
    num_found = int((cosine.amax(dim=1) > 0.9).sum())
    assert num_found >= 0.7 * NUM_FEATURES
    assert num_found >= 3 * max(int((control.amax(dim=1) > 0.9).sum()), 1)
    assert explained(sae) > 0.8


def test_a_transcoder_learns_what_a_layer_does() -> None:
    assert explained(trained(make("transcoder"))) > 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_folding_the_scales_changes_nothing(name: str) -> None:
    sae = trained(make(name), steps=3)
    assert sae.input_scale != 1
    x = planted(50, 1)[0]
    with torch.no_grad():
        before = sae(x)
        after = sae.fold_()(x)
    assert sae.input_scale == sae.output_scale == 1
    assert torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.allclose(before[1], after[1], atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_changes_nothing_until_it_is_taken(name: str) -> None:
    sae = make(name)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    x, target = planted(20, 1)[0], planted(20, 1, sae.d_out)[0]
    first, second = sae.training_step(x, target), sae.training_step(x, target)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "transcoder"])
def test_the_rows_of_the_decoder_keep_norm_1(name: str) -> None:
    sae = trained(make(name), steps=3)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.k), atol=1e-6)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_the_threshold_keeps_as_many_latents_as_training(name: str) -> None:
    sae = trained(make(name))
    assert isinstance(sae, BatchTopKSAE)
    num_active = float((sae.encode(planted(2000, 10_000)[0]) > 0).sum() / 2000)
    assert num_active == pytest.approx(ACTIVE, rel=0.05)


def test_the_threshold_is_right_from_the_first_batch_on() -> None:
    sae = make("batch_topk")
    x = planted(64, 0)[0]
    step = sae.training_step(x, x)
    sae.note(step, 64)
    assert isinstance(sae, BatchTopKSAE)
    assert float(sae.threshold) == pytest.approx(float(step.lowest), rel=1e-5)


def test_a_batch_holds_its_largest_entries_whatever_the_threshold_says() -> None:
    sae = make("batch_topk")
    assert isinstance(sae, BatchTopKSAE)
    x = planted(64, 0)[0]
    z = sae.pre_activations(sae.scaled(x)).relu().detach()
    expected = z.flatten().topk(64 * ACTIVE).values.sort().values
    for threshold in (0.0, float(expected[0]), float(expected[0]) * 10):
        sae.set_threshold(torch.tensor([threshold]))
        assert torch.equal(sae.training_code(x).value_M.sort().values, expected)


def test_a_latent_without_tokens_is_dead_after_the_window_and_gets_a_gradient() -> None:
    sae = make("topk", dead_window=100)
    with torch.no_grad():
        sae.b_enc[5] = -100.0
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.0)
    for step in range(3):
        assert not bool(sae.is_dead[5])
        x = planted(40, step)[0]
        assert float(take_step(sae, optimizer, x, x).aux) == 0.0
    assert bool(sae.is_dead[5])
    with torch.no_grad():
        sae.b_enc[5] = 1.0
    x = planted(40, 9)[0]
    sae.W_enc.grad = None
    loss = sae.dead_latents_loss(sae.scaled(x), x, 8)
    loss.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad[:, 5].abs().max() > 0
    assert float(loss) > 0


def test_thresholds_of_jumprelu_get_the_estimated_gradients() -> None:
    sae = make("jumprelu", l0=0.5, bandwidth=0.2)
    assert isinstance(sae, JumpReLUSAE)
    x = planted(200, 3)[0] / 10
    step = sae.training_step(x, x)
    step.loss.backward()
    pre = sae.pre_activations(sae.scaled(x)).relu().detach()
    threshold = sae.threshold.detach()
    z = torch.where(pre > threshold, pre, 0.0)
    grad_z = 2 * (z @ sae.W_dec + sae.b_dec - x).detach() @ sae.W_dec.detach().t() / x.numel()
    is_near = (pre - threshold).abs() <= 0.1
    expected = (-(threshold * grad_z + 0.5 / len(x)) / 0.2 * is_near).sum(dim=0) * threshold  # of the logarithm
    assert sae.log_threshold_K.grad is not None
    assert is_near.any()
    assert torch.allclose(sae.log_threshold_K.grad, expected, atol=1e-6)


def test_the_geometric_median_does_not_follow_an_outlier() -> None:
    x = torch.cat([torch.randn(101, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 1e6)])
    assert float(geometric_median(x).norm()) < 1.0
    assert float(x.mean(dim=0).norm()) > 1e3


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: TopKSAE(8, 4, active=5), r"active \(5\) must be >= 1 and <= k \(4\)"),
        (lambda: TopKSAE(0, 4, active=1), r"d_model \(0\) must be >= 1"),
        (lambda: TopKSAE(8, 4, active=1, aux_k=9), r"aux_k \(9\) must be >= 0 and <= k \(4\)"),
        (lambda: TopKSAE(8, 4, active=1, dead_window=0), r"dead_window \(0\) must be >= 1"),
        (lambda: SparseAutoencoder(8, 4, l1=-1.0), r"l1 \(-1.0\) must be >= 0"),
        (lambda: JumpReLUSAE(8, 4, bandwidth=0.0), r"bandwidth \(0.0\) must be > 0"),
        (lambda: MatryoshkaSAE(8, 4, active=1, prefixes=[2, 2, 4]), r"prefixes \(\[2, 2, 4\]\) must rise from >= 1 to k \(4\)"),
        (lambda: MatryoshkaSAE(8, 4, active=1, prefixes=[2, 3]), r"prefixes \(\[2, 3\]\) must rise"),
        (lambda: Transcoder(8, 4, active=1, d_out=0), r"d_out \(0\) must be >= 1"),
        (lambda: TopKSAE(8, 4, active=1)(torch.zeros(2, 9)), r"width of the activations \(9\) must be d_model \(8\)"),
        (lambda: TopKSAE(8, 4, active=1).start_from(torch.zeros(0, 8)), r"activations to start from \(0 tokens\)"),
        (lambda: TopKSAE(8, 4, active=1).start_from(torch.full((2, 8), torch.nan)), r"must be finite"),
    ],
)
def test_bad_settings_are_named(make_one: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_tokens_have_no_latents(name: str) -> None:
    sae = make(name)
    x_hat, z = sae(torch.zeros(0, WIDTH))
    assert z.shape == (0, 64)
    assert x_hat.shape == (0, sae.d_out)
