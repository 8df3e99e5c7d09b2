"""What both versions share; tests/trix/nn/test_sparse_lookup_v2.py holds what only v2 has."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.nn import SparseLookupBlock, SparseLookupBlockV2, SparseLookupFFN, SparseLookupFFNv2

VERSIONS = [SparseLookupFFN, SparseLookupFFNv2]
BLOCKS = [SparseLookupBlock, SparseLookupBlockV2]
both = pytest.mark.parametrize("version", VERSIONS)


def by_definition(
    ffn: SparseLookupFFN, x_TD: torch.Tensor, routing_TD: torch.Tensor | None
) -> tuple[list[list[int]], torch.Tensor]:
    """Token by token, with a loop over the tiles."""
    tiles, rows = [], []
    signatures = ffn.get_tile_signatures()
    for t, x in enumerate(x_TD):
        h = F.layer_norm(x, x.shape, ffn.norm.weight, ffn.norm.bias)
        read = h if routing_TD is None else routing_TD[t]
        scores = [float(read @ s) / math.sqrt(max(int((s != 0).sum()), 1)) for s in signatures]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: ffn.router.top_k]
        first, _, second, _ = ffn.compress
        point = torch.tanh(second(F.gelu(first(h))))
        y = x
        for e in best:
            size = ffn.magnitude(point[None], torch.tensor([e]))[0] * ffn.output_scale
            if isinstance(ffn, SparseLookupFFNv2):
                size = size * ffn.calibration(torch.tensor(scores[e], dtype=x.dtype))
            y = y + size * ffn.direction_ED[e]
        tiles.append(best)
        rows.append(y)
    return tiles, torch.stack(rows)


@both
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("reads_other", [False, True])
def test_output_and_choice_equal_the_definition(version, top_k: int, reads_other: bool) -> None:
    torch.manual_seed(0)
    ffn = version(12, 7, dropout=0.0, top_k=top_k).double()
    x, routing_x = torch.randn(2, 30, 12, dtype=torch.float64)
    with torch.no_grad():
        ffn.norm.bias.normal_()
        ffn.norm.weight.uniform_(0.5, 2.0)
        y, info, _ = ffn(x, routing_x=routing_x if reads_other else None)
        tiles, expected = by_definition(ffn, x, routing_x if reads_other else None)
    assert info["tile_idx"].reshape(30, top_k).tolist() == tiles
    assert info["weight"].shape == info["tile_idx"].shape == ((30,) if top_k == 1 else (30, 3))
    torch.testing.assert_close(y, expected)


@both
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (2, 0, 16)])
def test_an_empty_batch_with_labels(version, top_k: int, shape: tuple[int, ...]) -> None:
    ffn = version(16, 4, top_k=top_k)
    y, info, _ = ffn(torch.randn(shape), labels=torch.zeros(shape[:-1], dtype=torch.int64))
    assert y.shape == shape
    assert info["tile_idx"].shape == (shape[:-1] if top_k == 1 else (*shape[:-1], 2))
    assert ffn.claims.count_EC.sum() == 0


@both
def test_several_tiles_for_each_token_train_and_are_counted(version) -> None:
    torch.manual_seed(0)
    ffn = version(16, 4, top_k=3)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    y, info, aux = ffn(torch.randn(2, 5, 16), labels=torch.zeros(2, 5, dtype=torch.int64), mask=mask)
    (y.square().sum() + aux["total_aux"]).backward()
    assert ffn.usage_E.sum() == ffn.claims.count_EC.sum() == 3 * 7
    assert torch.equal(ffn.usage_E, info["tile_idx"][mask].flatten().bincount(minlength=4))
    assert all(parameter.grad is not None for parameter in ffn.parameters())


def test_signatures_of_v1_are_the_signs_of_its_directions() -> None:
    ffn = SparseLookupFFN(10, 4)
    assert torch.equal(ffn.get_tile_signatures(), ffn.direction_ED.sign())


@both
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (0, 16), (2, 0, 16), (1, 1, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("is_training", [True, False])
def test_shapes_and_keys(version, shape: tuple[int, ...], is_training: bool) -> None:
    ffn = version(16, 4).train(is_training)
    y, info, aux = ffn(torch.randn(shape))
    assert y.shape == shape
    assert info["tile_idx"].shape == shape[:-1]
    assert info["weight"].shape == shape[:-1]
    assert info["compressed"].shape == (*shape[:-1], 2)
    assert info["scores"].shape == (*shape[:-1], 4)
    assert info["compressed"].abs().le(1).all()
    assert set(aux) == {"balance", "ternary", "sparsity", "diversity", "total_aux"}
    assert all(value.isfinite() for value in aux.values())
    torch.testing.assert_close(aux["total_aux"], aux["balance"] + aux["ternary"] + aux["sparsity"] + aux["diversity"])


@both
@pytest.mark.parametrize(("d_model", "num_tiles", "grid_size"), [(16, 1, 4), (7, 3, 5), (3, 2, 1), (1, 1, 1)])
def test_odd_sizes_train(version, d_model: int, num_tiles: int, grid_size: int) -> None:
    ffn = version(d_model, num_tiles, tiles_per_cluster=2, grid_size=grid_size)
    y, _, aux = ffn(torch.randn(4, 3, d_model), labels=torch.randint(0, 9, (4, 3)))
    (y.square().sum() + aux["total_aux"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ffn.parameters())
    assert ffn.get_routing_stats()["num_clusters"] == math.ceil(num_tiles / 2)


@both
def test_a_non_contiguous_input_gives_the_same(version) -> None:
    ffn = version(8, 4).eval()
    x = torch.randn(8, 5, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(ffn(x)[0], ffn(x.contiguous())[0])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(version, dtype: torch.dtype) -> None:
    ffn = version(16, 4).to(dtype)
    y, _, aux = ffn(torch.randn(2, 3, 16).to(dtype))
    assert y.dtype == dtype
    (y.sum() + aux["total_aux"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ffn.parameters())


@both
def test_autocast_keeps_the_routing(version) -> None:
    ffn = version(64, 8).eval()
    x = torch.randn(50, 64)
    y, info, _ = ffn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_half, info_half, _ = ffn(x)
    assert torch.equal(info["tile_idx"], info_half["tile_idx"])
    assert y_half.dtype == torch.float32
    torch.testing.assert_close(y_half, y, rtol=0.05, atol=0.05)


@both
def test_padding_is_computed_but_counts_nowhere(version) -> None:
    torch.manual_seed(0)
    padded, alone = version(16, 4, dropout=0.0), version(16, 4, dropout=0.0)
    alone.load_state_dict(padded.state_dict())
    x, labels = torch.randn(2, 6, 16), torch.randint(0, 5, (2, 6))
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    labels[~mask] = 77  # whatever stands there
    y, _, aux = padded(x, labels=labels, mask=mask)
    _, _, aux_alone = alone(x[mask], labels=labels[mask])
    torch.testing.assert_close(aux["total_aux"], aux_alone["total_aux"])
    assert torch.equal(padded.usage_E, alone.usage_E)
    assert torch.equal(padded.claims.count_EC, alone.claims.count_EC)
    assert padded.usage_E.sum() == 8
    torch.testing.assert_close(y, padded.eval()(x)[0])
    assert padded.train()(x, mask=torch.zeros(2, 6, dtype=torch.bool))[2]["balance"] == 0.0
    with pytest.raises(ValueError, match=r"mask \(2, 5\) torch.bool must have shape \(2, 6\) torch.bool"):
        padded(x, mask=mask[:, :5])
    with pytest.raises(ValueError, match=r"mask \(2, 6\) torch.int64 must have shape"):
        padded(x, mask=mask.long())


@both
def test_every_parameter_gets_a_gradient_from_the_task(version) -> None:
    ffn = version(16, 4)
    ffn(torch.randn(200, 16))[0].square().sum().backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@both
def test_the_balance_loss_reaches_the_signatures_and_evens_the_load(version) -> None:
    torch.manual_seed(0)
    ffn = version(16, 8, balance_weight=1.0)
    x = torch.randn(512, 16)
    with torch.no_grad():
        ffn.norm.bias.copy_(2.0 * ffn.get_tile_signatures()[0])  # tile 0 wins too often
    signatures = ffn.direction_ED if version is SparseLookupFFN else ffn.router.raw_signatures
    optimizer = torch.optim.Adam([signatures], lr=0.02)
    losses = []
    for _ in range(150):
        balance = ffn(x)[2]["balance"]
        optimizer.zero_grad()
        balance.backward()
        optimizer.step()
        losses.append(float(balance.detach()))
    assert signatures.grad is not None
    assert losses[-1] < 0.7 * losses[0]


@both
def test_a_disabled_loss_is_exactly_zero(version) -> None:
    weights = {"balance_weight": 0.0}
    if version is SparseLookupFFNv2:
        weights |= {"ternary_weight": 0.0, "sparsity_weight": 0.0, "diversity_weight": 0.0}
    _, _, aux = version(16, 4, **weights)(torch.randn(3, 5, 16))
    assert all(value == 0.0 for value in aux.values())


@both
def test_forward_is_pure_in_evaluation_and_counts_in_training(version) -> None:
    ffn = version(16, 4).eval()
    state = {name: value.clone() for name, value in ffn.state_dict().items()}
    ffn(torch.randn(3, 5, 16))
    assert all(torch.equal(value, state[name]) for name, value in ffn.state_dict().items())
    ffn.train()(torch.randn(3, 5, 16))
    assert ffn.usage_E.sum() == 15


@both
def test_routing_stats_by_hand(version) -> None:
    ffn = version(16, 10, tiles_per_cluster=4)
    assert ffn.get_routing_stats() == {
        "num_tiles": 10,
        "num_clusters": 3,
        "active_tiles": 0,
        "frozen_tiles": 0,
        "usage_mean": 0.0,
        "usage_std": 0.0,
    }
    ffn.usage_E[:] = torch.tensor([5, 15] + [0] * 8)
    ffn.freeze_signature(3)
    stats = ffn.get_routing_stats()
    assert (stats["active_tiles"], stats["frozen_tiles"]) == (2, 1)
    assert stats["usage_mean"] == pytest.approx(0.1)
    assert stats["usage_std"] == pytest.approx(math.sqrt((0.15**2 + 0.65**2 + 8 * 0.1**2) / 10))


@both
def test_claims_by_hand(version) -> None:
    ffn = version(16, 3).eval()
    assert ffn.get_claim_rate(0, 0) == 0.0
    assert ffn.get_tile_purity(2) == (-1, 0.0)
    x = torch.randn(4, 6, 16)
    labels = torch.randint(0, 7, (4, 6))  # more classes than tiles
    labels[0, 0] = -100
    _, info, _ = ffn(x, labels=labels)
    for tile in range(3):
        mine = labels[(info["tile_idx"] == tile) & (labels >= 0)]
        for target in range(8):
            share = (mine == target).sum() / max(int((labels == target).sum()), 1)
            assert ffn.get_claim_rate(tile, target) == pytest.approx(float(share))
        if len(mine):
            counts = torch.bincount(mine)
            assert ffn.get_tile_purity(tile) == (int(counts.argmax()), pytest.approx(float(counts.max() / len(mine))))
    ffn(x)
    assert ffn.claims.count_EC.sum() == 23  # without labels nothing is counted
    ffn.reset_claim_tracking()
    assert ffn.get_tile_purity(int(info["tile_idx"][1, 1])) == (-1, 0.0)


@both
def test_a_label_for_each_sequence_and_declared_classes(version) -> None:
    ffn = version(16, 3, num_classes=2).eval()
    ffn(torch.randn(2, 5, 16), labels=torch.tensor([0, 1]))
    assert ffn.claims.count_EC.sum(dim=0).tolist() == [5, 5]
    with pytest.raises(ValueError, match=r"label \(2\) must be in \[0, num_classes \(2\)\) or -100"):
        ffn(torch.randn(2, 5, 16), labels=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"label \(-1\) must be"):
        ffn(torch.randn(2, 5, 16), labels=torch.tensor([0, -1]))


@both
def test_resetting_stats_keeps_the_history(version) -> None:
    ffn = version(16, 3)
    ffn.freeze_signature(0)
    ffn(torch.randn(2, 5, 16), labels=torch.tensor([0, 1]))
    ffn.reset_stats()
    assert ffn.get_routing_stats()["active_tiles"] == 0
    assert ffn.claims.count_EC.sum() == 0
    assert len(ffn.get_surgery_history()) == 1
    assert int(ffn.surgery_log.step) == 1


@both
def test_state_dict_and_deepcopy_keep_output_claims_and_usage(version) -> None:
    ffn, loaded = version(16, 4), version(16, 4)
    x = torch.randn(3, 5, 16)
    ffn(x, labels=torch.randint(0, 30, (3, 5)))
    loaded.load_state_dict(ffn.state_dict())
    for other in (loaded, copy.deepcopy(ffn)):
        assert torch.equal(other.claims.count_EC, ffn.claims.count_EC)
        assert other.get_routing_stats() == ffn.get_routing_stats()
        assert torch.equal(other.eval()(x)[0], ffn.eval()(x)[0])


@both
def test_packed_signatures_route_the_same(version) -> None:
    ffn = version(18, 6).eval()
    ffn.freeze_signature(2)
    x = torch.randn(40, 18)
    y, info, _ = ffn(x)
    ffn.pack()
    y_packed, info_packed, _ = ffn(x)
    assert torch.equal(info_packed["tile_idx"], info["tile_idx"])
    torch.testing.assert_close(y_packed, y)
    ffn.unpack()
    assert torch.equal(ffn(x)[0], y)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_packed_layer_in_evaluation_mode_computes_the_same(version, dtype: torch.dtype) -> None:
    ffn = version(18, 6, top_k=3, grid_size=5).to(dtype).eval()
    with torch.no_grad():
        ffn.output_scale.fill_(1.7)
        x = torch.randn(3, 40, 18, dtype=dtype)
        y, info, _ = ffn(x)
        ffn.pack()
        y_packed, info_packed, _ = ffn(x)
    assert y_packed.dtype == dtype
    torch.testing.assert_close(y_packed, y)
    for name in ("compressed", "weight"):
        torch.testing.assert_close(info_packed[name], info[name])


@both
def test_compiles_as_one_graph_in_both_modes(version) -> None:
    ffn = version(16, 4, dropout=0.0)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 16)
    y, _, aux = compiled(x, mask=torch.ones(2, 5, dtype=torch.bool))
    (y.sum() + aux["total_aux"]).backward()
    assert all(p.grad is not None for p in ffn.parameters())
    assert ffn.usage_E.sum() == 10
    assert int(ffn.surgery_log.step) == 1
    ffn.eval()
    torch.testing.assert_close(compiled(x)[0], ffn(x)[0])


@both
def test_exports_with_dynamic_batch_and_length(version) -> None:
    ffn = version(16, 4, top_k=2).eval()
    ffn.insert_signature(0, torch.ones(16))
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    program = torch.export.export(ffn, (torch.randn(2, 5, 16),), dynamic_shapes=dims)
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(program.module()(x)[0], ffn(x)[0])


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 50), st.sampled_from(VERSIONS))
def test_permuting_the_tiles_permutes_the_choice_and_keeps_the_output(order: list[int], seed: int, version) -> None:
    torch.manual_seed(seed)
    ffn = version(12, 5).double().eval()
    permuted = copy.deepcopy(ffn)
    with torch.no_grad():
        for name, parameter in permuted.named_parameters():
            if name.startswith(("direction", "router.", "magnitude.")):
                parameter.copy_(parameter[order].clone())
    x = torch.randn(10, 12, dtype=torch.float64)
    (y, info, _), (y_permuted, info_permuted, _) = ffn(x), permuted(x)
    torch.testing.assert_close(y_permuted, y)
    assert torch.equal(torch.tensor(order)[info_permuted["tile_idx"]], info["tile_idx"])


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_looks_back_only_and_gives_its_layer_access(block) -> None:
    model = block(d_model=32, n_heads=4, num_tiles=8, tiles_per_cluster=4).eval()
    x = torch.randn(2, 6, 32)
    y, info, aux = model(x, is_causal=True, labels=torch.tensor([0, 1]), mask=torch.ones(2, 6, dtype=torch.bool))
    assert y.shape == x.shape
    assert info["tile_idx"].shape == (2, 6)
    assert set(aux) >= {"balance", "total_aux"}
    assert model.ffn.claims.count_EC.sum() == 12
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, 32)
    torch.testing.assert_close(model(changed, is_causal=True)[0][:, :4], y[:, :4])
    assert not torch.allclose(model(changed, is_causal=False)[0][:, :4], model(x, is_causal=False)[0][:, :4])
    model.ffn.insert_signature(0, torch.ones(32), freeze=True)
    assert model.ffn.is_frozen(0)
    model.train()(x)[0].sum().backward()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_stands_in_the_padding_of_a_block_changes_no_other_token(block, is_causal: bool) -> None:
    model = block(d_model=16, n_heads=2, num_tiles=4).eval()
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True, False, True, True, False, True]])
    changed = torch.where(mask.unsqueeze(-1), x, torch.randn(2, 6, 16))
    y, y_changed = model(x, is_causal, mask=mask)[0], model(changed, is_causal, mask=mask)[0]
    torch.testing.assert_close(y_changed[mask], y[mask])


@both
def test_errors_state_the_rule_and_the_values(version) -> None:
    with pytest.raises(ValueError, match=r"last dimension of x \(6\) must equal d_model \(8\)"):
        version(8, 2)(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"compress_hidden \(0\) and tiles_per_cluster \(8\) must be >= 1"):
        version(8, 2, compress_hidden=0)
    with pytest.raises(ValueError, match=r"balance_weight \(-1.0\) must be >= 0"):
        version(8, 2, balance_weight=-1.0)
    with pytest.raises(ValueError, match=r"d_model \(8\) and num_tiles \(0\) must be >= 1"):
        version(8, 0)
    with pytest.raises(ValueError, match=r"top_k \(3\) must be >= 1 and <= num_tiles \(2\)"):
        version(8, 2, top_k=3)
    with pytest.raises(ValueError, match=r"routing_x \(2, 8\) must have the shape of x \(3, 8\)"):
        version(8, 2)(torch.randn(3, 8), routing_x=torch.randn(2, 8))
    ffn = version(8, 2)
    with pytest.raises(ValueError, match=r"tile_idx \(2\) must be >= 0 and < num_tiles \(2\)"):
        ffn.get_claim_rate(2, 0)
    with pytest.raises(ValueError, match=r"target_class \(-1\) must be >= 0"):
        ffn.get_claim_rate(0, -1)
    with pytest.raises(ValueError, match=r"tile_idx \(-1\) must be >= 0 and < num_tiles \(2\)"):
        ffn.get_tile_purity(-1)
