"""Steering: what changes nothing changes no bit, the right tokens are changed, and no hook outlives its use."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.superposition.merge import merge_sae
from trix.superposition.sae import SAE, TopKSAE
from trix.superposition.steering import (
    merge_wrapper,
    multi_latent_modifier,
    register_prehook_last_row,
    set_or_scale_latent,
    steering,
)
from trix.superposition.steering.hooks import LatentMap, steered

WIDTH, VOCABULARY = 16, 20


@dataclass
class Backend:
    """A language model of this package as steering sees it."""

    model: LanguageModel

    def block(self, layer: int) -> nn.Module:
        blocks = self.model.stack.blocks
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer ({layer}) must be >= 0 and < number of layers ({len(blocks)})")
        return blocks[layer]

    @property
    def num_hooks(self) -> int:
        return sum(len(module._forward_pre_hooks) for module in self.model.modules())


@pytest.fixture
def backend() -> Backend:
    torch.manual_seed(0)
    config = LanguageModelConfig(WIDTH, num_layers=2, n_heads=2, context_length=12, ffn=FFNConfig("dense"))
    return Backend(LanguageModel(VOCABULARY, config).eval())


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(1)
    made = TopKSAE(WIDTH, 24, active=4)
    made.start_from(torch.randn(50, WIDTH))
    return made.eval()


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))


def streams(backend: Backend, token_BT: Tensor, **named: Any) -> list[Tensor]:
    """What enters each block, and the logits."""
    seen: list[Tensor] = []
    with torch.no_grad():
        logits = backend.model(token_BT, hidden_states=seen, return_routing=True, **named)[0]
    return [*seen, logits]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("same", [lambda z: z, set_or_scale_latent(3, scale_by=1.0)])
def test_a_map_that_changes_nothing_changes_no_bit(backend: Backend, sae: SAE, positions: Any, same: LatentMap) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        backend.model.to(dtype)
        plain = streams(backend, tokens())
        with steering(backend, 1, sae, same, positions):
            for ours, its in zip(streams(backend, tokens()), plain, strict=True):
                assert torch.equal(ours, its)


def test_the_stream_moves_along_the_rows_of_the_decoder(sae: SAE) -> None:
    x = torch.randn(5, WIDTH)
    z = sae.encode(x)
    moved = steered(x, sae, set_or_scale_latent(7, set_to=2.0))
    expected = x + (2.0 - z[:, 7:8]) * (sae.W_dec[7] / sae.output_scale)
    assert torch.allclose(moved, expected, atol=1e-6)
    several = steered(x, sae, multi_latent_modifier([7, 9], set_to=2.0))
    assert torch.allclose(several, expected + (2.0 - z[:, 9:10]) * (sae.W_dec[9] / sae.output_scale), atol=1e-6)
    idle = (z == 0).nonzero()[0]
    assert torch.equal(steered(x[idle[0]][None], sae, set_or_scale_latent(int(idle[1]), scale_by=9.0)), x[idle[0]][None])


def differs(backend: Backend, sae: SAE, mask: Tensor | None, positions: Any) -> Tensor:
    """bool [B, T]: where the input of block 1 differs from what it is without steering."""
    plain, seen = streams(backend, tokens(), mask_BT=mask), []
    hook = backend.block(1).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with steering(backend, 1, sae, set_or_scale_latent(5, set_to=30.0), positions):
        hook.remove()  # and again, so that it sees what the steering made
        hook = backend.block(1).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        streams(backend, tokens(), mask_BT=mask)
    hook.remove()
    return (seen[-1] != plain[1]).any(dim=-1)


def test_the_last_real_token_is_steered_wherever_the_padding_is(backend: Backend, sae: SAE) -> None:
    last = torch.zeros(3, 6, dtype=torch.bool)
    last[:, -1] = True
    assert torch.equal(differs(backend, sae, None, "last"), last)
    right = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[[0, 1, 2], [2, 5, 4]] = True
    assert torch.equal(differs(backend, sae, right, "last"), expected)
    assert torch.equal(differs(backend, sae, right, "all"), right)
    assert torch.equal(differs(backend, sae, right.flip(-1), "last"), last)


def test_every_new_token_is_steered_in_generation(backend: Backend, sae: SAE) -> None:
    token_BT, seen = tokens()[:, :4], []
    state = backend.model.empty_state(3)
    direction = nn.functional.normalize(sae.W_dec[5].detach(), dim=0)
    with steering(backend, 1, sae, set_or_scale_latent(5, set_to=30.0)), torch.no_grad():
        hook = backend.block(1).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        _, state = backend.model(token_BT, state=state)
        for _ in range(3):
            _, state = backend.model(token_BT[:, :1], state=state)
    hook.remove()
    along = [(x @ direction).abs() for x in seen]
    assert [x.shape[1] for x in seen] == [4, 1, 1, 1]
    assert all(float(x[:, -1].min()) > 10 for x in along)
    assert float(along[0][:, :-1].max()) < 10


def test_no_hook_is_left_after_an_error(backend: Backend, sae: SAE) -> None:
    def fail(z: Tensor) -> Tensor:
        if len(z) > 1:
            raise RuntimeError("in the map")
        return z

    with pytest.raises(RuntimeError, match="in the map"), steering(backend, 1, sae, fail):
        streams(backend, tokens())
    assert backend.num_hooks == 0
    handle = register_prehook_last_row(backend, 1, sae, set_or_scale_latent(latent_j=5, set_to=1.0))
    assert backend.num_hooks == 2
    handle.remove()
    handle.remove()
    assert backend.num_hooks == 0


def test_merged_latents_steer_all_of_a_cluster(sae: SAE) -> None:
    label_K = torch.arange(24) % 5
    merged = merge_sae(sae, label_K, lambda: [torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(3))])
    x = torch.randn(4, WIDTH)
    moved = steered(x, merged, set_or_scale_latent(2, scale_by=2.0))
    assert torch.allclose(moved, x + merged.encode(x)[:, 2:3] * merged.W_dec[2], atol=1e-5)
    assert steered(x, merged, lambda z: z) is x


def test_merged_latents_are_sums() -> None:
    merged = merge_wrapper(lambda x: x * 2, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    assert merged(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[8.0, 4.0]]
    with pytest.raises(ValueError, match=r"rows of M \(3\) must be the number of latents \(2\)"):
        merged(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: set_or_scale_latent(3), r"exactly one of set_to \(None\) and scale_by \(None\)"),
        (lambda: set_or_scale_latent(3, 1.0, 2.0), r"exactly one of set_to \(1.0\) and scale_by \(2.0\)"),
        (lambda: set_or_scale_latent(set_to=1.0), r"exactly one of j \(None\) and latent_j \(None\)"),
        (lambda: set_or_scale_latent(-1, 1.0), r"latents to modify \(\[-1\]\) must be different numbers >= 0"),
        (lambda: multi_latent_modifier([], 1.0), r"latents to modify \(\[\]\)"),
        (lambda: multi_latent_modifier([2, 2], 1.0), r"latents to modify \(\[2, 2\]\)"),
        (lambda: set_or_scale_latent(1.5, 1.0), r"latents to modify \(\[1\.5\]\) must be ints"),  # type: ignore[arg-type]
        (lambda: set_or_scale_latent(3, float("nan")), r"set_to \(nan\) must be finite"),
        (lambda: set_or_scale_latent(3, scale_by=float("inf")), r"scale_by \(inf\) must be finite"),
    ],
)
def test_maps_that_say_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_refused_before_the_model_runs(backend: Backend, sae: SAE) -> None:
    for layer, positions, latent_map, message in (
        (2, "last", lambda z: z, r"layer \(2\) must be >= 0 and < number of layers \(2\)"),
        (1, "first", lambda z: z, r"positions \('first'\) must be 'last' or 'all'"),
        (1, "last", set_or_scale_latent(24, 1.0), r"latent to modify \(24\) must be < number of latents \(24\)"),
        (1, "last", lambda z: z[:, :3], r"latents of the map \(shape \[1, 3\]\)"),
    ):
        with pytest.raises(ValueError, match=message), steering(backend, layer, sae, latent_map, positions):  # type: ignore[arg-type]
            pass
        assert backend.num_hooks == 0
