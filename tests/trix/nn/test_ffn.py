import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trix import TriXFFN
from trix.nn import (
    DenseFFN,
    FFNConfig,
    HierarchicalTriXFFN,
    LanguageModel,
    LanguageModelConfig,
    SparseLookupFFN,
    routed_layers,
)

ROUTINGS = ["explicit", "emergent", "learned"]


def by_definition(ffn: TriXFFN, x_TD: torch.Tensor) -> torch.Tensor:
    """Token by token, tile by tile."""
    _, info, _ = ffn(x_TD, return_routing=True)
    up, down = ffn.tiles.up.ternary(), ffn.tiles.down.ternary()
    rows = []
    for x, chosen, weights in zip(x_TD, info["tile_idx"], info["weight"], strict=True):
        tiles = [w * (down[e] @ F.relu(up[e] @ x).square()) for e, w in zip(chosen, weights, strict=True)]
        rows.append(torch.stack(tiles).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_output_equals_the_definition(routing: str, top_k: int) -> None:
    ffn = TriXFFN(12, 4, d_ff=20, top_k=top_k, routing=routing).double().eval()
    x = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(ffn(x), by_definition(ffn, x))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_training_and_evaluation_compute_the_same(routing: str) -> None:
    ffn = TriXFFN(16, 4, routing=routing, balance_rate=0.0)  # the balance bias moves between the two otherwise
    x = torch.randn(2, 6, 16)
    assert torch.equal(ffn.train()(x), ffn.eval()(x))


def test_the_full_output_width_is_written() -> None:
    y = TriXFFN(32, 4)(torch.randn(64, 32))
    assert (y != 0).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (0, 16), (2, 0, 16), (1, 1, 16)])
def test_shapes_and_routing_info(shape: tuple[int, ...]) -> None:
    ffn = TriXFFN(16, 4, top_k=2)
    x = torch.randn(shape)
    y, info, aux = ffn(x, return_routing=True)
    assert y.shape == x.shape
    assert info["tile_idx"].shape == (*shape[:-1], 2)
    assert info["weight"].shape == (*shape[:-1], 2)
    assert info["scores"].shape == (*shape[:-1], 4)
    assert aux["total_aux"].isfinite()


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 50))
def test_permuting_the_tiles_permutes_the_choice_and_keeps_the_output(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    ffn = TriXFFN(12, 5, top_k=2, routing="explicit").double().eval()
    permuted = copy.deepcopy(ffn)
    with torch.no_grad():
        permuted.router.raw_signatures.copy_(ffn.router.raw_signatures[order])
        permuted.tiles.up.weight.copy_(ffn.tiles.up.weight[order])
        permuted.tiles.down.weight.copy_(ffn.tiles.down.weight[order])
    x = torch.randn(10, 12, dtype=torch.float64)
    y, info, _ = ffn(x, return_routing=True)
    y_permuted, info_permuted, _ = permuted(x, return_routing=True)
    torch.testing.assert_close(y_permuted, y)
    assert torch.equal(torch.tensor(order)[info_permuted["tile_idx"]], info["tile_idx"])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_parameter_gets_a_gradient(routing: str) -> None:
    ffn = TriXFFN(16, 4, top_k=2, routing=routing)
    y, _, aux = ffn(torch.randn(64, 16), return_routing=True)
    (y.square().sum() + aux["total_aux"]).backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    ffn = TriXFFN(16, 4).to(dtype)
    y = ffn(torch.randn(2, 3, 16).to(dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert y.isfinite().all()


def test_autocast_computes_in_bfloat16_and_keeps_the_routing() -> None:
    ffn = TriXFFN(64, 4).eval()
    x = torch.randn(50, 64)
    y, info, _ = ffn(x, return_routing=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_half, info_half, _ = ffn(x, return_routing=True)
    assert torch.equal(info["tile_idx"], info_half["tile_idx"])
    assert not torch.equal(y, y_half)
    torch.testing.assert_close(y_half, y, rtol=0.1, atol=0.1 * y.abs().max().item())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_packing_keeps_output_routing_and_signatures(routing: str) -> None:
    ffn = TriXFFN(18, 6, d_ff=30, top_k=2, routing=routing).eval()
    x = torch.randn(40, 18)
    y, info, _ = ffn(x, return_routing=True)
    signatures = ffn.get_tile_signatures()
    loaded = TriXFFN(18, 6, d_ff=30, top_k=2, routing=routing).eval()
    ffn.pack()
    loaded.load_state_dict(ffn.state_dict())
    for packed in (ffn, loaded, copy.deepcopy(ffn)):
        y_packed, info_packed, _ = packed(x, return_routing=True)
        torch.testing.assert_close(y_packed, y)
        assert torch.equal(info_packed["tile_idx"], info["tile_idx"])
        assert torch.equal(packed.get_tile_signatures(), signatures)
    ffn.unpack()
    torch.testing.assert_close(ffn(x), y)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_compiles_as_one_graph(routing: str) -> None:
    ffn = TriXFFN(16, 4, top_k=2, routing=routing).eval()
    x = torch.randn(8, 16)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ffn(x))
    compiled.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in ffn.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    ffn = TriXFFN(16, 4, routing="explicit").eval()
    x = torch.randn(8, 16)
    torch.testing.assert_close(torch.compile(ffn, fullgraph=True)(x), ffn(x))


@pytest.mark.parametrize("is_packed", [False, True])
def test_exports_with_a_dynamic_batch(is_packed: bool) -> None:
    ffn = TriXFFN(16, 4, top_k=2).eval()
    if is_packed:
        ffn.pack()
    program = torch.export.export(ffn, (torch.randn(4, 16),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    x = torch.randn(9, 16)
    torch.testing.assert_close(program.module()(x), ffn(x))


def test_routing_stats_by_hand() -> None:
    ffn = TriXFFN(4, 2, routing="explicit")
    with torch.no_grad():
        ffn.router.raw_signatures.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))
    x = torch.tensor([[3.0, 1, 0, 0], [2, 1, 0, 0], [4, 1, 0, 0], [0, 2, 0, 0]])
    before = ffn.router.balance_bias.clone()
    stats = ffn.train().get_routing_stats(x)
    assert stats["usage"] == [0.75, 0.25]
    assert stats["balance"] == pytest.approx(1 / 3)
    assert stats["entropy"] == pytest.approx(0.5623, abs=1e-4)
    assert stats["dominant_tile"] == 0
    assert stats["confidence"] == pytest.approx((2 + 1 + 3 + 2) / 4)
    assert torch.equal(ffn.router.balance_bias, before)


def test_diversity_and_signatures_of_emergent_tiles() -> None:
    ffn = TriXFFN(32, 4, routing="emergent")
    signatures = ffn.get_tile_signatures()
    sums = ffn.tiles.up.codes_and_scale()[0].sum(1)
    assert torch.equal(signatures, sums.sign() * (sums.abs() > 0.3 * (3 * ffn.tiles.up.shape[1]) ** 0.5))
    assert 0.3 < (signatures == 0).float().mean() < 0.6
    with torch.no_grad():
        ffn.tiles.up.weight[:] = ffn.tiles.up.weight[0]
    assert ffn.get_signature_diversity() == pytest.approx(0.0, abs=1e-6)


def test_the_gate_moves_emergent_signatures_through_the_weights_they_are_read_from() -> None:
    torch.manual_seed(0)
    ffn = TriXFFN(16, 4, routing="emergent", balance_rate=0.0, balance_weight=0.0)
    assert "router" not in {name.split(".")[0] for name, _ in ffn.named_parameters()}  # nothing of its own to learn
    x, wanted = torch.randn(64, 16), torch.arange(64) % 4
    optimizer = torch.optim.Adam(ffn.parameters(), 0.02)

    def loss() -> torch.Tensor:
        return F.cross_entropy(ffn(x, return_routing=True)[1]["scores"], wanted)

    before = loss()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < before - 0.3


def test_freezing_an_emergent_signature_holds_it_while_its_tile_trains() -> None:
    ffn = TriXFFN(16, 4, routing="emergent")
    ffn.freeze_signature(1)
    before = ffn.get_tile_signatures()
    with torch.no_grad():
        ffn.tiles.up.weight.neg_()
    after = ffn.get_tile_signatures()
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0], -before[0])
    ffn.unfreeze_signature(1)
    assert torch.equal(ffn.get_tile_signatures()[1], -before[1])


def test_errors_state_the_rule_and_both_values() -> None:
    with pytest.raises(ValueError, match=r"d_ff \(10\) must be divisible by num_tiles \(4\)"):
        TriXFFN(8, 4, d_ff=10)
    with pytest.raises(ValueError, match=r"top_k \(3\) must be >= 1 and <= num_tiles \(2\)"):
        TriXFFN(8, 2, top_k=3)
    with pytest.raises(ValueError, match=r"routing \('magic'\) must be"):
        TriXFFN(8, 2, routing="magic")
    with pytest.raises(ValueError, match=r"last dimension of x \(6\) must equal d_model \(8\)"):
        TriXFFN(8, 2)(torch.randn(3, 6))
    with pytest.raises(ValueError, match="no signatures to freeze"):
        TriXFFN(8, 2, routing="learned").freeze_signature(0)


@pytest.mark.parametrize("name", ["balance_weight", "balance_rate", "diversity_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [TriXFFN, HierarchicalTriXFFN])
def test_weights_and_rates_are_not_negative_and_finite(kind: type[TriXFFN], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be >= 0 and finite"):
        kind(8, 2, routing="explicit", **{name: value})


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"max_k": 2}, {"routing": "emergent"}, {"routing": "learned"}])
def test_padding_is_neither_computed_nor_counted(options: dict[str, Any]) -> None:
    """A masked batch gives what its tokens give without the padding: outputs, losses, balance, gradients."""
    torch.manual_seed(0)
    padded, bare = (TriXFFN(16, 4, **options) for _ in range(2))
    bare.load_state_dict(padded.state_dict())
    x = torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    y, info, aux = padded(x, return_routing=True, mask=mask)
    y_bare, info_bare, aux_bare = bare(x[mask], return_routing=True)
    torch.testing.assert_close(y[mask], y_bare)
    assert not y[~mask].any()
    assert torch.equal(info["tile_idx"][mask], info_bare["tile_idx"])
    assert not info["weight"][~mask].any()
    torch.testing.assert_close(aux["balance"], aux_bare["balance"])
    assert torch.equal(padded.router.balance_bias, bare.router.balance_bias)
    (y.square().sum() + aux["total_aux"]).backward()
    (y_bare.square().sum() + aux_bare["total_aux"]).backward()
    for got, want in zip(padded.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_a_mask_must_fit() -> None:
    with pytest.raises(ValueError, match=r"mask \(3, 4\) torch.bool must have shape \(3, 5\) torch.bool"):
        TriXFFN(8, 2)(torch.randn(3, 5, 8), mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask \(3, 5\) torch.int64 must have"):
        TriXFFN(8, 2)(torch.randn(3, 5, 8), mask=torch.ones(3, 5, dtype=torch.int64))


def test_config_builds_each_kind() -> None:
    assert FFNConfig(kind="none").build(8) is None
    dense = FFNConfig(kind="dense").build(8)
    assert isinstance(dense, DenseFFN)
    assert dense.up.out_features == 32
    trix = FFNConfig(num_tiles=2, top_k=2, routing="learned").build(8)
    assert isinstance(trix, TriXFFN)
    assert trix.router.top_k == 2
    hierarchical = FFNConfig(kind="hierarchical", num_tiles=9, tiles_per_cluster=4, num_probes=2).build(8)
    assert isinstance(hierarchical, HierarchicalTriXFFN)
    assert (hierarchical.router.num_clusters, hierarchical.router.num_probes) == (3, 2)
    with pytest.raises(ValueError, match=r"max_k \(2\) must be None where kind is 'hierarchical'"):
        FFNConfig(kind="hierarchical", max_k=2).build(8)
    with pytest.raises(ValueError, match=r"num_probes \(2\) must be None where kind is 'trix'"):
        FFNConfig(num_probes=2).build(8)
    with pytest.raises(ValueError, match=r"kind \('soft'\) must be"):
        FFNConfig(kind="soft").build(8)


def test_by_default_a_token_meets_the_same_width_whatever_top_k_is() -> None:
    for config, top_k, width in [
        (FFNConfig(), 1, 16),
        (FFNConfig(top_k=4), 4, 4),
        (FFNConfig(num_tiles=1), 1, 16),
        (FFNConfig(max_k=2), 2, 16),
        (FFNConfig(routing="hash"), 1, 16),
    ]:
        layer = config.build(16)
        assert isinstance(layer, TriXFFN)
        assert (layer.router.top_k, layer.tiles.up.shape[1]) == (top_k, width)


@pytest.mark.parametrize("kind", ["sparse_lookup", "sparse_lookup_v2"])
def test_a_language_model_of_sparse_lookups_reports_and_trains(kind: Any) -> None:
    torch.manual_seed(0)
    ffn = FFNConfig(kind=kind, num_tiles=4)
    model = LanguageModel(7, LanguageModelConfig(16, 2, 2, context_length=12, ffn=ffn))
    token_BT = torch.randint(0, 7, (3, 12))
    logits, infos, aux = model(token_BT, return_routing=True)
    assert [info["tile_idx"].shape for info in infos] == [(3, 12, 1)] * 2
    assert aux is not None
    (logits.logsumexp(-1).mean() + aux["total_aux"]).backward()
    for layer in routed_layers(model):
        assert isinstance(layer, SparseLookupFFN)
        assert layer.direction_ED.grad is not None
        assert layer.direction_ED.grad.abs().sum() > 0
    assert all(isinstance(block.feed_forward, SparseLookupFFN) for block in model.stack.blocks)  # a second norm would be unused


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"kind": "trix", "num_probes": 2}, "num_probes"),
        ({"kind": "hierarchical", "max_k": 2}, "max_k"),
        ({"kind": "sparse_lookup", "d_ff": 2}, "d_ff"),
        ({"kind": "sparse_lookup", "diversity_weight": 0.1}, "diversity_weight"),
        ({"kind": "sparse_lookup_v2", "routing": "hash"}, "routing"),
    ],
)
def test_an_argument_that_a_kind_does_not_have_is_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(.+\) must be .+ where kind is '{arguments['kind']}'"):
        FFNConfig(**arguments).build(8)
