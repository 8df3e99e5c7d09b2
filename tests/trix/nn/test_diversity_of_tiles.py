import pytest
import torch

from trix import TriXFFN
from trix.nn import GatedFFN, HierarchicalTriXFFN

ROUTINGS = ["explicit", "emergent", "learned"]


def collapsed_ffn(routing: str, weight: float = 1.0) -> TriXFFN:
    """All tiles nearly the same."""
    torch.manual_seed(0)
    ffn = TriXFFN(32, 6, d_ff=96, routing=routing, diversity_weight=weight, balance_weight=0.0)
    with torch.no_grad():
        up = ffn.tiles.up.weight
        up.copy_(up[:1] + 0.02 * torch.randn_like(up) * up.abs().mean())
        if routing == "explicit":
            raw = ffn.router.raw_signatures
            raw.copy_(raw[:1] + 0.01 * torch.randn_like(raw))
    return ffn


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loss_raises_a_collapsed_diversity_to_its_target(routing: str) -> None:
    ffn = collapsed_ffn(routing).train()
    assert ffn.get_signature_diversity() < 0.15
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.01)
    for _ in range(200):
        diversity = ffn.get_signature_diversity()
        _, _, aux = ffn(torch.randn(16, 32), return_routing=True)
        assert aux["diversity"].item() == pytest.approx(max(0.0, 0.5 - diversity), abs=1e-5)
        assert torch.equal(aux["total_aux"], aux["diversity"])
        optimizer.zero_grad()
        aux["total_aux"].backward()
        optimizer.step()
    assert ffn.get_signature_diversity() >= 0.45


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_disabled_loss_is_exactly_zero(routing: str) -> None:
    for ffn in (collapsed_ffn(routing, 0.0).train(), collapsed_ffn(routing, 1.0).eval()):
        aux = ffn(torch.randn(4, 32), return_routing=True)[2]
        assert aux["diversity"].item() == 0.0
        assert aux["ternary"].item() == aux["sparsity"].item() == aux["total_aux"].item() == 0.0


@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_pressure_moves_free_signatures_and_no_frozen_one(routing: str) -> None:
    ffn = collapsed_ffn(routing, 5.0).train()
    ffn.freeze_signature(2)
    before = ffn.get_tile_signatures()
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(60):
        _, _, aux = ffn(torch.randn(16, 32), return_routing=True)
        optimizer.zero_grad()
        aux["total_aux"].backward()
        optimizer.step()
    after = ffn.get_tile_signatures()
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[3], before[3])


@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_reseeding_parts_exact_copies_which_no_gradient_can(routing: str) -> None:
    ffn = collapsed_ffn(routing)
    with torch.no_grad():
        ffn.tiles.up.weight[:] = ffn.tiles.up.weight[:1].clone()
        if routing == "explicit":
            ffn.router.raw_signatures[:] = ffn.router.raw_signatures[:1].clone()
    ffn.freeze_signature(3)
    kept = ffn.get_tile_signatures()[3]
    assert ffn.reseed_collapsed_tiles(tag="all alike") == [0, 1, 2, 4, 5]
    assert torch.equal(ffn.get_tile_signatures()[3], kept)
    assert ffn.get_signature_diversity() > 0.4
    assert ffn.reseed_collapsed_tiles() == []
    assert [entry["operation"] for entry in ffn.get_surgery_history()] == ["freeze"] + ["reseed"] * 5
    assert ffn.get_surgery_history()[1]["tag"] == "all alike"
    ffn.pack()
    with pytest.raises(ValueError, match="packed"):
        ffn.reseed_collapsed_tiles()


def test_every_routed_layer_takes_the_weight_and_checks_it() -> None:
    layer = HierarchicalTriXFFN(16, 6, diversity_weight=0.5, target_diversity=0.9).train()
    aux = layer(torch.randn(8, 16), return_routing=True)[2]
    assert aux["diversity"].item() == pytest.approx(0.5 * (0.9 - layer.get_signature_diversity()), abs=1e-5)
    with pytest.raises(ValueError, match=r"diversity_weight \(-1.0\) must be >= 0"):
        TriXFFN(8, 2, diversity_weight=-1.0)
    with pytest.raises(ValueError, match=r"target_diversity \(2.0\) must be >= 0 and <= 1"):
        TriXFFN(8, 2, target_diversity=2.0)
    with pytest.raises(ValueError, match="no signatures"):
        GatedFFN(8, 2).reseed_collapsed_tiles()


def test_the_loss_compiles_with_the_layer() -> None:
    ffn = collapsed_ffn("emergent").train()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    _, _, aux = compiled(torch.randn(8, 32), return_routing=True)
    aux["total_aux"].backward()
    assert ffn.tiles.up.weight.grad.abs().sum() > 0
