import copy
import io

import pytest
import torch
import torch.nn.functional as F

from trix import TriXFFN
from trix.evolution import (
    copy_tile_state,
    merge_tiles,
    raise_k,
    redundant_pairs,
    reseed_tile,
    reset_signature_state,
    reset_tile_state,
    split_tile,
    tile_parameters,
)
from trix.nn import HierarchicalTriXFFN, SparseLookupFFNv2
from trix.routing.balance import tile_load

LAYERS = [(TriXFFN, "explicit"), (TriXFFN, "emergent"), (HierarchicalTriXFFN, "explicit"), (HierarchicalTriXFFN, "emergent")]
every_layer = pytest.mark.parametrize(("kind", "routing"), LAYERS)


def layer_of(kind: type[TriXFFN], routing: str, **settings: object) -> TriXFFN:
    torch.manual_seed(0)
    ffn = kind(24, 6, routing=routing, **settings).double().eval()
    with torch.no_grad():
        ffn.router.balance_bias.copy_(0.3 * torch.randn(6))
    return ffn


def plant_duplicate(ffn: TriXFFN, source: int, target: int) -> None:
    with torch.no_grad():
        for parameter in tile_parameters(ffn):
            parameter[target] = parameter[source]
    if isinstance(ffn, HierarchicalTriXFFN):
        ffn.recluster()


@every_layer
def test_merging_duplicates_keeps_the_function(kind: type[TriXFFN], routing: str) -> None:
    ffn = layer_of(kind, routing)
    plant_duplicate(ffn, 1, 4)
    x = torch.randn(500, 24, dtype=torch.float64)
    y = ffn(x)
    merge_tiles(ffn, 1, 4, tag="alike")
    after, info, _ = ffn(x, return_routing=True)
    torch.testing.assert_close(after, y, rtol=1e-12, atol=1e-14)
    assert not (info["tile_idx"] == 4).any()
    assert (info["tile_idx"] == 1).any()
    entry = ffn.get_surgery_history()[-1]
    assert entry == {"operation": "merge", "tile_idx": 1, "step": 0, "tag": "alike", "dropped": 4}


@every_layer
def test_splitting_into_a_free_slot_keeps_the_function_and_both_halves_can_be_chosen(kind: type[TriXFFN], routing: str) -> None:
    ffn = layer_of(kind, routing)
    plant_duplicate(ffn, 1, 4)
    merge_tiles(ffn, 1, 4)
    x = torch.randn(500, 24, dtype=torch.float64)
    y = ffn(x)
    signature = ffn.get_tile_signatures()[3]
    split_tile(ffn, 3, 4, tag="busy")
    torch.testing.assert_close(ffn(x), y, rtol=1e-12, atol=1e-14)
    assert torch.equal(ffn.get_tile_signatures()[4], signature)
    assert ffn.get_surgery_history()[-1]["target"] == 4
    with torch.no_grad():
        ffn.router.balance_bias[4] += 1e-3  # as balancing does to the one without tokens
    after, info, _ = ffn(x, return_routing=True)
    torch.testing.assert_close(after, y, rtol=1e-12, atol=1e-14)
    assert (info["tile_idx"] == 4).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acts_are_exact_up_to_rounding_in_every_precision(dtype: torch.dtype) -> None:
    ffn = layer_of(TriXFFN, "explicit").to(dtype)
    plant_duplicate(ffn, 0, 5)
    x = torch.randn(300, 24).to(dtype)
    y = ffn(x).detach()
    merge_tiles(ffn, 0, 5)
    split_tile(ffn, 2, 5)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ffn(x), y, rtol=rounding, atol=rounding * float(y.abs().max()))


def test_without_the_mass_a_merge_would_change_the_gates() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    plant_duplicate(ffn, 1, 4)
    x = torch.randn(200, 24, dtype=torch.float64)
    y = ffn(x)
    merge_tiles(ffn, 1, 4)
    ffn.router.log_mass_E.zero_()
    assert (ffn(x) - y).abs().max() > 0.05 * y.abs().max()


def test_the_halves_of_an_explicit_split_part_as_they_learn() -> None:
    ffn = layer_of(TriXFFN, "explicit").train()
    reseed_tile(ffn, 0)
    split_tile(ffn, 3, 0)
    assert torch.equal(ffn.get_tile_signatures()[0], ffn.get_tile_signatures()[3])
    assert not torch.equal(ffn.router.raw_signatures[0], ffn.router.raw_signatures[3])
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.01)
    for _ in range(60):
        x = torch.randn(64, 24, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(ffn(x), x.roll(1, dims=-1)).backward()
        optimizer.step()
    assert not torch.equal(ffn.get_tile_signatures()[0], ffn.get_tile_signatures()[3])


@every_layer
def test_a_free_slot_takes_no_tokens_until_it_is_seeded_again(kind: type[TriXFFN], routing: str) -> None:
    ffn = layer_of(kind, routing)
    merge_tiles(ffn, 2, 3)
    with torch.no_grad():
        ffn.router.balance_bias[3] = 100.0
    x = torch.randn(200, 24, dtype=torch.float64)
    assert not (ffn(x, return_routing=True)[1]["tile_idx"] == 3).any()
    reseed_tile(ffn, 3)
    assert ffn.router.balance_bias[3] < ffn.router.balance_bias[[0, 1, 2, 4, 5]].min()
    with torch.no_grad():
        ffn.router.balance_bias[3] = 100.0
    assert (ffn(x, return_routing=True)[1]["tile_idx"] == 3).all()


@every_layer
def test_the_marks_of_evolution_travel_with_the_layer(kind: type[TriXFFN], routing: str) -> None:
    ffn = layer_of(kind, routing)
    merge_tiles(ffn, 2, 3)
    raise_k(ffn)
    x = torch.randn(100, 24, dtype=torch.float64)
    y, info, _ = ffn(x, return_routing=True)
    assert info["tile_idx"].shape == (100, 2)
    file = io.BytesIO()
    torch.save(ffn.state_dict(), file)
    file.seek(0)
    other = kind(24, 6, routing=routing).double().eval()
    state = torch.load(file, weights_only=True)
    for _ in range(2):  # loading twice raises k once
        other.load_state_dict(state)
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(other)(x), y)
    assert other.get_surgery_history() == ffn.get_surgery_history()
    other.load_state_dict(kind(24, 6, routing=routing).state_dict())
    assert other.router.top_k == 1
    program = torch.export.export(ffn, (x,))
    torch.testing.assert_close(program.module()(x), y)
    torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), y)
    ffn.pack()
    torch.testing.assert_close(ffn(x), y)
    for act in (
        lambda: merge_tiles(ffn, 0, 1),
        lambda: reseed_tile(ffn, 0),
        lambda: raise_k(ffn),
        lambda: redundant_pairs(ffn),
    ):
        with pytest.raises(ValueError, match="the layer is packed"):
            act()


def test_mass_returns_to_one_in_training() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    merge_tiles(ffn, 0, 1)
    assert ffn.router.log_mass_E[0].exp().item() == pytest.approx(2.0)
    ffn(torch.randn(4, 24, dtype=torch.float64))
    assert ffn.router.log_mass_E[0].exp().item() == pytest.approx(2.0)
    ffn.train()
    for _ in range(500):
        ffn(torch.randn(4, 24, dtype=torch.float64))
    assert ffn.router.log_mass_E.abs().max() < 0.01


def test_raising_k_gives_every_token_its_next_best_tile_too() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    two = TriXFFN(24, 6, 24 * 6, top_k=2, routing="explicit").double().eval()
    two.load_state_dict(ffn.state_dict())
    x = torch.randn(50, 24, dtype=torch.float64)
    raise_k(ffn, tag="unsure")
    assert torch.equal(ffn(x), two(x))
    assert ffn.get_surgery_history() == [{"operation": "raise_k", "tile_idx": -1, "step": 0, "tag": "unsure", "top_k": 2}]
    adaptive = layer_of(TriXFFN, "explicit", max_k=2)
    raise_k(adaptive)
    three = layer_of(TriXFFN, "explicit", max_k=3)
    assert torch.equal(adaptive(x), three(x))


def test_redundant_pairs_answer_to_the_same_most_alike_first() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    assert redundant_pairs(ffn, 0.9) == []
    plant_duplicate(ffn, 1, 4)
    plant_duplicate(ffn, 0, 5)
    with torch.no_grad():
        ffn.router.raw_signatures[5, ffn.get_tile_signatures()[5].nonzero()[0]] = 0.0
    assert redundant_pairs(ffn, 0.9) == [(1, 4), (0, 5)]
    assert redundant_pairs(ffn, 1.0) == [(1, 4)]
    merge_tiles(ffn, 4, 1)
    assert redundant_pairs(ffn, 0.9) == [(0, 5)]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    ],
)
def test_optimizer_state_follows_the_tile_and_leaves_the_others(make_optimizer) -> None:
    ffn = TriXFFN(6, 6, d_ff=24, routing="explicit")
    assert [tuple(p.shape) for p in tile_parameters(ffn)] == [(6, 6), (6, 4, 6), (6, 6, 4)]
    optimizer = make_optimizer(ffn.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        ffn(torch.randn(100, 6)).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    copy_tile_state(optimizer, ffn, 1, 2)
    reset_tile_state(optimizer, ffn, 4)
    after = optimizer.state_dict()["state"]
    num_checked = 0
    for index, state in after.items():
        for name, value in state.items():
            old = before[index][name]
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert value == old
                continue
            num_checked += 1
            assert torch.equal(value[2], old[1])
            assert not value[4].any()
            assert torch.equal(value[[0, 1, 3, 5]], old[[0, 1, 3, 5]])
    assert num_checked in (3, 9)
    before_step = ffn.router.raw_signatures[4].clone()
    optimizer.step()  # the same gradients again: the tile moves on
    assert not torch.equal(ffn.router.raw_signatures[4], before_step)


@pytest.mark.parametrize("make_layer", [lambda: TriXFFN(6, 6, routing="explicit"), lambda: SparseLookupFFNv2(6, 6)])
def test_the_optimizer_can_forget_a_signature_alone(make_layer) -> None:
    layer = make_layer()
    optimizer = torch.optim.Adam(layer.parameters())
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    memory = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in layer.named_parameters()}
    before = copy.deepcopy(memory)
    reset_signature_state(optimizer, layer, 4)
    assert not memory["router.raw_signatures"][4].any()
    before["router.raw_signatures"][4] = 0
    assert all(torch.equal(value, before[name]) for name, value in memory.items())


def test_an_emergent_signature_has_no_state_to_forget() -> None:
    layer = TriXFFN(6, 6, routing="emergent")
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(9, 6)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    reset_signature_state(optimizer, layer, 4)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][name]) for name, value in state.items())


@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_frozen_signatures_are_never_changed(routing: str) -> None:
    ffn = layer_of(TriXFFN, routing)
    ffn.freeze_signature(2)
    state = copy.deepcopy(ffn.state_dict())
    for act in (lambda: merge_tiles(ffn, 1, 2), lambda: split_tile(ffn, 1, 2), lambda: reseed_tile(ffn, 2)):
        with pytest.raises(ValueError, match=r"the signature of \w+ \(2\) must not be frozen"):
            act()
    for name, value in ffn.state_dict().items():
        assert torch.equal(value, state[name]), name
    kept = ffn.get_tile_signatures()[2]
    merge_tiles(ffn, 2, 3)
    assert torch.equal(ffn.get_tile_signatures()[2], kept)
    if routing == "explicit":
        with torch.no_grad():
            ffn.router.raw_signatures.neg_()  # a frozen signature is what counts, not the value behind it
        split_tile(ffn, 2, 3)
        assert torch.equal(ffn.get_tile_signatures()[[2, 3]], kept.expand(2, -1))
        assert not ffn.is_frozen(3)
    else:
        with pytest.raises(ValueError, match=r"the signature of source_idx \(2\) must not be frozen"):
            split_tile(ffn, 2, 3)


def test_an_inserted_signature_takes_a_free_slot_into_use() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    merge_tiles(ffn, 0, 5)
    ffn.insert_signature(5, torch.eye(24)[0])
    x = torch.zeros(1, 24, dtype=torch.float64)
    x[0, 0] = 100.0
    assert ffn(x, return_routing=True)[1]["tile_idx"].item() == 5


def test_errors_state_the_rule_and_the_values() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    with pytest.raises(ValueError, match=r"keep_idx \(1\) must differ from drop_idx \(1\)"):
        merge_tiles(ffn, 1, 1)
    with pytest.raises(ValueError, match=r"tile_idx \(6\) must be >= 0 and < num_tiles \(6\)"):
        split_tile(ffn, 1, 6)
    merge_tiles(ffn, 0, 1)
    with pytest.raises(ValueError, match=r"source_idx \(1\) must be a tile in use, not a free slot"):
        split_tile(ffn, 1, 2)
    with pytest.raises(ValueError, match=r"drop_idx \(1\) must be a tile in use"):
        merge_tiles(ffn, 0, 1)
    with pytest.raises(ValueError, match=r"top_k \(2\) must be 1 to merge tiles"):
        merge_tiles(layer_of(TriXFFN, "explicit", top_k=2), 0, 1)
    with pytest.raises(ValueError, match=r"max_k \(2\) must be 1 to split tiles"):
        split_tile(layer_of(TriXFFN, "explicit", max_k=2), 0, 1)
    for _ in range(4):
        raise_k(ffn)
    with pytest.raises(ValueError, match=r"top_k \(6\) must be <= the number of tiles in use and in reach \(5\)"):
        raise_k(ffn)
    probing = layer_of(HierarchicalTriXFFN, "explicit", num_probes=1)
    raise_k(probing)
    raise_k(probing)
    with pytest.raises(ValueError, match=r"top_k \(4\) must be <= the number of tiles in use and in reach \(3\)"):
        raise_k(probing)
    for routing in ("learned", "hash", "scattering"):
        with pytest.raises(ValueError, match="must be a SignatureRouter"):
            reseed_tile(TriXFFN(8, 4, routing=routing), 0)
    with pytest.raises(ValueError, match=r"min_cosine \(2.0\) must be >= -1 and <= 1"):
        redundant_pairs(ffn, 2.0)


def test_tiles_in_use_are_balanced_among_themselves() -> None:
    """Slots that merging freed are no load to wish for: the others do not sink, and an inserted tile does not sweep up all."""
    torch.manual_seed(0)
    ffn = TriXFFN(24, 6, routing="explicit", balance_rate=0.05).train()
    for dropped in (4, 5):
        plant_duplicate(ffn, 0, dropped)
        merge_tiles(ffn, 0, dropped)
    x = torch.randn(400, 24) + 0.5
    for _ in range(300):
        ffn(x)
    load = tile_load(ffn.router(x).tile_idx, 6)
    assert load[:4].max() < 1.3 * load[:4].mean()
    assert ffn.router.balance_bias[4:].tolist() == [0.0, 0.0]
    assert abs(ffn.router.balance_bias[:4].mean()) < 0.5
    ffn.insert_signature(4, torch.randn(24).sign(), freeze=False)
    assert tile_load(ffn.router(x).tile_idx, 6)[4] < 0.6


def test_the_lowest_tile_does_not_sink_with_every_draw() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    lowest = float(ffn.router.balance_bias[[0, 1, 3, 4, 5]].min())
    for _ in range(3):
        reseed_tile(ffn, 2)
    assert float(ffn.router.balance_bias[2]) == pytest.approx(lowest - 1.0)


def test_a_free_slot_neither_collapses_nor_makes_others_collapsed() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    plant_duplicate(ffn, 0, 1)
    merge_tiles(ffn, 1, 0)  # the free slot 0 still holds the signature of tile 1
    assert ffn.reseed_collapsed_tiles() == []


def test_a_load_that_fails_leaves_k_as_it_was_told() -> None:
    ffn = layer_of(TriXFFN, "explicit")
    raised = copy.deepcopy(ffn)
    raise_k(raised)
    ffn.load_state_dict(raised.state_dict())
    assert ffn.router.top_k == 2
    fresh = layer_of(TriXFFN, "explicit")
    ffn.load_state_dict(fresh.state_dict())
    assert ffn.router.top_k == 1
    with torch.device("meta"):
        empty = TriXFFN(24, 6, routing="explicit")
    empty.load_state_dict(raised.state_dict(), assign=True)
    assert empty.router.top_k == 2
