import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.routing import LearnedRouter, SignatureRouter


def test_decision_follows_the_formula() -> None:
    router = SignatureRouter(d_model=8, num_tiles=4, top_k=2)
    x = torch.randn(10, 8)
    decision = router(x)
    signatures = router.signatures()
    score = x @ signatures.T / signatures.ne(0).sum(-1).clamp_min(1).sqrt()
    torch.testing.assert_close(decision.score, score)
    assert torch.equal(decision.tile_idx, score.topk(2).indices)
    torch.testing.assert_close(decision.weight, score.softmax(-1).gather(1, decision.tile_idx) * math.sqrt(4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100.0))
def test_scaling_the_input_does_not_reroute(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = SignatureRouter(16, 6, top_k=2).double()
    x = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    assert torch.equal(router(x).tile_idx, router(x * factor).tile_idx)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_a_batch_routes_as_its_rows_do_one_by_one(seed: int) -> None:
    router = SignatureRouter(12, 5, top_k=2).double()
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.cat([router(row[None]).tile_idx for row in x])
    assert torch.equal(router(x).tile_idx, rows)


def test_identical_signatures_send_everything_to_the_lowest() -> None:
    router = SignatureRouter(8, 4)
    with torch.no_grad():
        router.raw_signatures[:] = router.raw_signatures[0]
    assert router(torch.randn(50, 8)).tile_idx.eq(0).all()


def test_the_bias_changes_the_choice_but_not_the_weight_of_a_tile() -> None:
    router = SignatureRouter(8, 4)
    x = torch.randn(30, 8)
    free = router(x)
    router.balance_bias[2] = 100.0
    pushed = router(x)
    assert pushed.tile_idx.eq(2).all()
    assert torch.equal(pushed.score, free.score)
    torch.testing.assert_close(pushed.weight[:, 0], free.score.softmax(-1)[:, 2] * 2)


def test_updating_the_balance_evens_the_load() -> None:
    torch.manual_seed(0)
    router = SignatureRouter(16, 8)
    x = torch.randn(512, 16) + 1.0

    def max_over_mean() -> float:
        return float(torch.bincount(router(x).tile_idx.flatten(), minlength=8).max() / (512 / 8))

    before = max_over_mean()
    for _ in range(300):
        router.update_balance(router(x).tile_idx)
    assert max_over_mean() < min(1.3, before)


def test_routing_is_pure() -> None:
    router = SignatureRouter(8, 4).train()
    state = {name: value.clone() for name, value in router.state_dict().items()}
    router(torch.randn(10, 8))
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())


def test_gradient_reaches_explicit_signatures_through_the_gate() -> None:
    router = SignatureRouter(8, 4)
    router(torch.randn(10, 8)).weight.sum().backward()
    assert router.raw_signatures.grad.abs().sum() > 0


@pytest.mark.parametrize("source", ["explicit", "emergent"])
def test_a_gate_of_ones_weighs_all_chosen_tiles_alike_and_learns_as_the_softmax_does(source: str) -> None:
    torch.manual_seed(0)
    emergent = torch.randn(6, 12, requires_grad=True) if source == "emergent" else None
    ones, softmax = (SignatureRouter(12, 6, top_k=3, source=source, gate=gate) for gate in ("ones", "softmax"))
    ones.load_state_dict(softmax.state_dict())
    x, factor = torch.randn(40, 12), torch.randn(40, 3)
    gradients = []
    for router in (ones, softmax):
        decision = router(x, emergent_ED=emergent)
        learned = router.raw_signatures if emergent is None else emergent
        gradients += torch.autograd.grad((decision.weight * factor).sum(), learned)
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0
    decision = ones(x, emergent_ED=emergent)
    assert torch.equal(decision.weight, torch.ones(40, 3))
    assert torch.equal(decision.tile_idx, softmax(x, emergent_ED=emergent).tile_idx)
    ones.pack_signatures(emergent)
    packed = ones(x)
    assert torch.equal(packed.weight, torch.ones(40, 3))
    assert torch.equal(packed.tile_idx, decision.tile_idx)


def test_other_gates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate \('sigmoid'\) must be 'softmax' or 'ones'"):
        SignatureRouter(8, 4, gate="sigmoid")
    with pytest.raises(ValueError, match=r"gate \('ones'\) must be 'softmax' where max_k \(2\) chooses k token by token"):
        SignatureRouter(8, 4, gate="ones", max_k=2)


def test_emergent_signatures_must_be_given_and_explicit_ones_must_not() -> None:
    signatures, x = torch.ones(4, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match="'emergent' needs them"):
        SignatureRouter(8, 4, source="emergent")(x)
    with pytest.raises(ValueError, match="'explicit' takes none"):
        SignatureRouter(8, 4)(x, emergent_ED=signatures)
    with pytest.raises(ValueError, match=r"signatures \(3, 8\) must have shape \(4, 8\)"):
        SignatureRouter(8, 4, source="emergent")(x, emergent_ED=signatures[:3])


@pytest.mark.parametrize("source", ["explicit", "emergent"])
def test_a_frozen_signature_is_bit_exact_under_an_optimizer_and_a_free_one_moves(source: str) -> None:
    torch.manual_seed(1)
    router = SignatureRouter(16, 4, source=source)
    weights = torch.nn.Parameter(torch.randn(4, 16))
    emergent = (lambda: weights.sign()) if source == "emergent" else (lambda: None)
    frozen = router.signatures(emergent())[1].clone()
    free = router.signatures(emergent())[2].clone()
    router.freeze(1, emergent())
    optimizer = torch.optim.AdamW([weights, *router.parameters()], lr=0.3, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (router(torch.randn(32, 16), emergent_ED=emergent()).weight.square().sum() + weights.square().sum()).backward()
        optimizer.step()
        with torch.no_grad():
            weights.add_(torch.randn_like(weights))  # whatever moves the tiles
    assert torch.equal(router.signatures(emergent())[1], frozen)
    assert not torch.equal(router.signatures(emergent())[2], free)
    router.unfreeze(1)
    assert not router.is_frozen(1)
    if source == "explicit":
        assert torch.equal(router.signatures()[1], frozen)  # learning goes on from the frozen value


def test_freezing_survives_a_state_dict() -> None:
    router, other = SignatureRouter(8, 4), SignatureRouter(8, 4)
    router.freeze(3)
    other.load_state_dict(router.state_dict())
    assert other.is_frozen(3)
    assert torch.equal(other.signatures(), router.signatures())


@pytest.mark.parametrize("tile_idx", [-1, 4])
def test_a_tile_that_does_not_exist_is_refused(tile_idx: int) -> None:
    with pytest.raises(ValueError, match=rf"tile_idx \({tile_idx}\) must be >= 0 and < num_tiles \(4\)"):
        SignatureRouter(8, 4).freeze(tile_idx)


def test_packed_routing_is_the_same_and_unpacks() -> None:
    router = SignatureRouter(10, 6, top_k=3)
    router.balance_bias.copy_(torch.randn(6) * 0.1)
    x = torch.randn(40, 10)
    before = router(x)
    router.pack_signatures()
    after = router(x)
    assert torch.equal(before.tile_idx, after.tile_idx)
    torch.testing.assert_close(before.weight, after.weight)
    with pytest.raises(ValueError, match="packed"):
        router.freeze(0)
    router.unpack_signatures()
    assert torch.equal(router(x).tile_idx, before.tile_idx)


def test_a_foreign_packed_state_is_refused() -> None:
    router = SignatureRouter(8, 4)
    router.pack_signatures()
    state = router.state_dict()
    with pytest.raises(ValueError, match=r"packed signatures \(4, 2\) must have shape \(4, 3\)"):
        SignatureRouter(12, 4).load_state_dict(state)
    state["packed_signatures"][0, 0] = 0b11
    with pytest.raises(ValueError, match="reserved field 11"):
        SignatureRouter(8, 4).load_state_dict(state)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"top_k \(5\) must be >= 1 and <= num_tiles \(4\)"):
        SignatureRouter(8, 4, top_k=5)
    with pytest.raises(ValueError, match=r"last dimension of x \(7\) must equal d_model \(8\)"):
        SignatureRouter(8, 4)(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"last dimension of x \(7\) must equal d_model \(8\)"):
        LearnedRouter(8, 4)(torch.randn(2, 7))


def test_the_learned_gate_receives_gradient() -> None:
    router = LearnedRouter(8, 4, top_k=2)
    router(torch.randn(10, 8)).weight.sum().backward()
    assert router.gate_ED.grad is not None
    assert router.gate_ED.grad.abs().sum() > 0


@pytest.mark.parametrize("is_packed", [False, True])
def test_scores_stay_in_float32_under_autocast(is_packed: bool) -> None:
    router = SignatureRouter(64, 8)
    if is_packed:
        router.pack_signatures()
    x = torch.randn(100, 64)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = router(x)
    assert decision.score.dtype == torch.float32
    assert torch.equal(decision.score, expected.score)
