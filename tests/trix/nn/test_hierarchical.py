import copy
import io

import pytest
import torch

from trix import TriXFFN
from trix.nn import HierarchicalTriXFFN

SOURCES = ["explicit", "emergent"]


@pytest.mark.parametrize("routing", SOURCES)
def test_the_layer_changes_its_input_at_initialisation_and_every_parameter_learns(routing: str) -> None:
    ffn = HierarchicalTriXFFN(16, 10, top_k=2, routing=routing)
    x = torch.randn(4, 30, 16)
    y, info, aux = ffn(x, return_routing=True)
    assert (y - x).abs().mean() > 0.1
    assert y.abs().mean() > 1e-3
    assert info["scores"].shape == (4, 30, 10)
    (y.square().sum() + aux["total_aux"]).backward()
    assert aux["balance"] > 0
    before = copy.deepcopy(ffn.state_dict())
    torch.optim.SGD(ffn.parameters(), lr=0.1).step()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("routing", SOURCES)
def test_tiles_compute_what_the_flat_choice_names(routing: str) -> None:
    ffn = HierarchicalTriXFFN(20, 12, top_k=2, routing=routing).double().eval()
    x = torch.randn(25, 20, dtype=torch.float64)
    y, info, _ = ffn(x, return_routing=True)
    flat = TriXFFN(20, 12, top_k=2, routing=routing).double().eval()
    flat.load_state_dict(ffn.state_dict(), strict=False)
    assert torch.equal(flat(x, return_routing=True)[1]["tile_idx"], info["tile_idx"])
    torch.testing.assert_close(y, flat.tiles(x, info["tile_idx"], info["weight"]))


def test_balance_bias_evens_the_load() -> None:
    torch.manual_seed(0)
    ffn = HierarchicalTriXFFN(16, 9).train()
    x = torch.randn(600, 16) + 1.0
    before = ffn.get_routing_stats(x)["balance"]
    for _ in range(200):
        ffn(x)
    assert ffn.get_routing_stats(x)["balance"] > max(0.4, before)


def test_stats_tell_recall_and_cost() -> None:
    torch.manual_seed(0)
    exact = HierarchicalTriXFFN(32, 64)
    x = torch.randn(5, 40, 32)
    assert exact.get_routing_stats(x)["recall"] == 1.0
    probing = HierarchicalTriXFFN(32, 64, num_probes=2)
    stats = probing.get_routing_stats(x)
    assert 0.2 < stats["recall"] < 1.0
    assert stats["scored_share"] == pytest.approx(2 / 8)


@pytest.mark.parametrize("num_probes", [None, 2])
def test_compiles_and_exports(num_probes: int | None) -> None:
    ffn = HierarchicalTriXFFN(16, 12, top_k=2, num_probes=num_probes).eval()
    x = torch.randn(8, 16)
    torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))
    program = torch.export.export(ffn, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    other = torch.randn(5, 16)
    torch.testing.assert_close(program.module()(other), ffn(other))


@pytest.mark.parametrize("routing", SOURCES)
def test_state_dict_packing_and_copies(routing: str) -> None:
    ffn = HierarchicalTriXFFN(16, 11, routing=routing).eval()
    x = torch.randn(30, 16)
    y = ffn(x)
    file = io.BytesIO()
    torch.save(ffn.state_dict(), file)
    file.seek(0)
    other = HierarchicalTriXFFN(16, 11, routing=routing).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(ffn)(x), y)
    ffn.pack()
    torch.testing.assert_close(ffn(x), y)
    ffn.unpack()
    torch.testing.assert_close(ffn(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 16), (2, 0, 16)])
def test_dtypes_and_empty_batches(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ffn = HierarchicalTriXFFN(16, 7).to(dtype)
    y = ffn(torch.randn(shape).to(dtype))
    assert y.dtype == dtype
    assert y.shape == shape
    y.sum().backward()


def test_autocast_keeps_the_choice() -> None:
    ffn = HierarchicalTriXFFN(64, 16).eval()
    x = torch.randn(50, 64)
    expected = ffn(x, return_routing=True)[1]["tile_idx"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ffn(x, return_routing=True)[1]["tile_idx"], expected)


def test_a_single_tile_and_a_wrong_routing() -> None:
    assert HierarchicalTriXFFN(8, 1)(torch.randn(3, 8)).shape == (3, 8)
    with pytest.raises(ValueError, match=r"routing \('learned'\) must be 'explicit' or 'emergent'"):
        HierarchicalTriXFFN(8, 4, routing="learned")


def test_what_is_inserted_is_where_the_search_looks() -> None:
    torch.manual_seed(0)
    ffn = HierarchicalTriXFFN(32, 64, num_probes=1)
    signature_D = torch.randint(-1, 2, (32,)).float()
    ffn.insert_signature(0, signature_D)
    assert ffn.router.select(4 * signature_D.unsqueeze(0))[0].tolist() == [[0]]
    before = copy.deepcopy(ffn.state_dict())
    ffn.recluster()
    assert all(torch.equal(value, before[name]) for name, value in ffn.state_dict().items())
