import copy
import io
from typing import Any

import pytest
import torch

from trix.nn import FFNConfig, SparseLookupFFN, SparseLookupFFNv2, TriXFFN
from trix.routing import SignatureSurgery, SurgeryLog

WIDTH, NUM_TILES = 16, 4
LAYERS = {
    "trix explicit": lambda: TriXFFN(WIDTH, NUM_TILES, routing="explicit"),
    "trix emergent": lambda: TriXFFN(WIDTH, NUM_TILES, routing="emergent"),
    "lookup v1": lambda: SparseLookupFFN(WIDTH, NUM_TILES),
    "lookup v2": lambda: SparseLookupFFNv2(WIDTH, NUM_TILES),
}
EXPLICIT = ["trix explicit", "lookup v2"]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> SignatureSurgery:
    torch.manual_seed(0)
    return LAYERS[request.param]()


def run(layer: SignatureSurgery, x: torch.Tensor) -> Any:
    return layer(x, return_routing=True) if isinstance(layer, TriXFFN) else layer(x)


def concept() -> torch.Tensor:
    signature = torch.zeros(WIDTH)
    signature[:5], signature[7:9] = 1.0, -1.0
    return signature


def test_an_inserted_signature_is_the_one_in_force(layer: SignatureSurgery) -> None:
    before = layer.get_tile_signatures()
    layer.insert_signature(2, concept(), freeze=True, tag="concept")
    after = layer.get_tile_signatures()
    assert torch.equal(after[2], concept())
    assert torch.equal(layer.get_raw_signatures()[2], concept())
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert layer.is_frozen(2)
    assert not layer.is_frozen(1)
    assert layer.get_signature_analysis(2) == {
        "tile_idx": 2,
        "positive_dims": [0, 1, 2, 3, 4],
        "negative_dims": [7, 8],
        "zero_count": 9,
        "frozen": True,
    }


def test_a_token_like_the_signature_goes_to_its_tile(layer: SignatureSurgery) -> None:
    layer.insert_signature(3, concept())
    _, info, _ = run(layer.eval(), 10 * concept()[None])
    assert info["tile_idx"].flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.bfloat16])
def test_any_dtype_that_holds_the_values_can_be_inserted(layer: SignatureSurgery, dtype: torch.dtype) -> None:
    layer.insert_signature(0, concept().to(dtype))
    assert torch.equal(layer.get_tile_signatures()[0], concept())


@pytest.mark.parametrize(
    ("tile_idx", "value", "message"),
    [
        (0, 0.5, r"signature\[1\] \(0.5\) must be -1, 0 or 1"),
        (0, 2.0, r"signature\[1\] \(2.0\) must be -1, 0 or 1"),
        (0, float("nan"), r"signature\[1\] \(nan\) must be -1, 0 or 1"),
        (0, float("-inf"), r"signature\[1\] \(-inf\) must be -1, 0 or 1"),
        (4, 1.0, r"tile_idx \(4\) must be >= 0 and < num_tiles \(4\)"),
        (-1, 1.0, r"tile_idx \(-1\) must be >= 0 and < num_tiles \(4\)"),
    ],
)
def test_a_bad_insert_states_both_values_and_changes_nothing(
    layer: SignatureSurgery, tile_idx: int, value: float, message: str
) -> None:
    state = copy.deepcopy(layer.state_dict())
    signature = torch.zeros(WIDTH)
    signature[1] = value
    with pytest.raises(ValueError, match=message):
        layer.insert_signature(tile_idx, signature)
    for shape in [(WIDTH - 1,), (1, WIDTH), ()]:
        with pytest.raises(ValueError, match=r"signature \(.*\) must have shape \(16,\)"):
            layer.insert_signature(0, torch.zeros(shape))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert layer.get_surgery_history() == []


@pytest.mark.parametrize("tile_idx", [-1, 4])
def test_a_tile_that_does_not_exist_is_refused_by_every_operation(layer: SignatureSurgery, tile_idx: int) -> None:
    for operation in ("freeze_signature", "unfreeze_signature", "is_frozen", "get_signature_analysis"):
        with pytest.raises(ValueError, match=rf"tile_idx \({tile_idx}\) must be >= 0 and < num_tiles \(4\)"):
            getattr(layer, operation)(tile_idx)
    assert layer.get_surgery_history() == []


def test_the_history_tells_every_operation_with_step_and_tag(layer: SignatureSurgery) -> None:
    layer.insert_signature(1, concept(), tag="concept")
    layer.train()(torch.randn(3, WIDTH))
    layer.eval()(torch.randn(3, WIDTH))
    layer.unfreeze_signature(1)
    layer.train()(torch.randn(3, WIDTH))
    layer.freeze_signature(0, tag="keep")
    history = layer.get_surgery_history()
    assert [(h["operation"], h["tile_idx"], h["step"], h["tag"]) for h in history] == [
        ("insert", 1, 0, "concept"),
        ("unfreeze", 1, 1, ""),
        ("freeze", 0, 2, "keep"),
    ]
    assert history[0]["positive_dims"] == [0, 1, 2, 3, 4]
    assert history[0]["frozen"] is True
    history[0]["tag"] = "forged"
    assert layer.get_surgery_history()[0]["tag"] == "concept"


def test_everything_survives_deepcopy_and_a_checkpoint(layer: SignatureSurgery) -> None:
    layer.train()(torch.randn(3, WIDTH))
    layer.insert_signature(1, concept(), tag="Grüße")
    layer.freeze_signature(3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(layer)
    loaded.unfreeze_signature(1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), loaded):
        assert other.get_surgery_history() == layer.get_surgery_history()
        assert [other.is_frozen(e) for e in range(NUM_TILES)] == [False, True, False, True]
        assert torch.equal(other.get_raw_signatures(), layer.get_raw_signatures())
        other.train()(torch.randn(3, WIDTH))
        other.freeze_signature(0)
        assert other.get_surgery_history()[-1]["step"] == 2
    assert len(layer.get_surgery_history()) == 2


def train(layer: SignatureSurgery, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        x = torch.randn(64, WIDTH)
        y, _, aux = run(layer, x)
        optimizer.zero_grad()
        ((y - x.roll(1, dims=-1)).square().mean() + aux["total_aux"]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", EXPLICIT)
def test_frozen_means_bit_exact_under_all_that_moves_an_unfrozen_control(name: str) -> None:
    """Momentum from before the insert, weight decay 0.1, a near-duplicate neighbour, a strong pressure to differ from it."""
    torch.manual_seed(0)
    layer: SignatureSurgery = (
        SparseLookupFFNv2(WIDTH, NUM_TILES, diversity_weight=10.0, ternary_weight=1.0)
        if name == "lookup v2"
        else TriXFFN(WIDTH, NUM_TILES, routing="explicit", diversity_weight=10.0, target_diversity=1.0)
    )
    control = copy.deepcopy(layer)
    for each, freeze in ((layer, True), (control, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.02, weight_decay=0.1)
        train(each, optimizer, 20)
        neighbour = concept()
        neighbour[15] = 1.0
        each.insert_signature(1, concept(), freeze=freeze)
        each.insert_signature(2, neighbour, freeze=False)
        train(each, optimizer, 60)
    assert torch.equal(layer.get_raw_signatures()[1], concept())
    assert torch.equal(layer.get_tile_signatures()[1], concept())
    assert (control.get_raw_signatures()[1] - concept()).abs().max() > 0.3
    assert not torch.equal(control.get_tile_signatures()[1], concept())
    layer.unfreeze_signature(1)
    assert torch.equal(layer.get_raw_signatures()[1], concept())  # learning goes on from the frozen value
    train(layer, torch.optim.AdamW(layer.parameters(), lr=0.02), 30)
    assert not torch.equal(layer.get_raw_signatures()[1], concept())


def test_freezing_a_learned_signature_keeps_its_ternary_form_to_the_bit() -> None:
    layer = SparseLookupFFNv2(WIDTH, NUM_TILES)
    signature_ED = layer.get_tile_signatures()
    layer.freeze_signature(0)
    before = layer.get_raw_signatures()
    assert torch.equal(before[0], signature_ED[0])
    train(layer, torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.1), 20)
    assert torch.equal(layer.get_raw_signatures()[0], before[0])
    assert not torch.equal(layer.get_raw_signatures()[1], before[1])


@pytest.mark.parametrize("name", ["trix emergent", "lookup v1"])
def test_an_emergent_signature_can_only_be_inserted_frozen(name: str) -> None:
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=r"freeze \(False\) must be True .* read from the tiles' weights"):
        layer.insert_signature(0, concept(), freeze=False)
    layer.insert_signature(0, concept())
    train(layer, torch.optim.AdamW(layer.parameters(), lr=0.02), 5)
    assert torch.equal(layer.get_tile_signatures()[0], concept())
    layer.unfreeze_signature(0)
    assert not torch.equal(layer.get_tile_signatures()[0], concept())  # read from the tile again


@pytest.mark.parametrize("name", EXPLICIT)
def test_an_unfrozen_insert_thaws_a_frozen_tile(name: str) -> None:
    layer = LAYERS[name]()
    layer.freeze_signature(1)
    layer.insert_signature(1, concept(), freeze=False)
    assert not layer.is_frozen(1)
    assert torch.equal(layer.get_raw_signatures()[1], concept())


def test_an_inserted_tile_does_not_inherit_the_bias_and_a_frozen_one_is_not_pushed_away() -> None:
    layer = TriXFFN(WIDTH, NUM_TILES, routing="explicit")
    layer.router.balance_bias.copy_(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    layer.insert_signature(3, concept())
    assert layer.router.balance_bias.tolist() == [1.0, 0.0, 2.0, 1.5]
    for _ in range(50):
        layer.router.update_balance(torch.full((64, 1), 3))  # it claims every token
    # The others gain 0.01 a step, a learning tile 3 would lose 0.01; frozen, it is at rest, and gets the mean of the moves.
    assert layer.router.balance_bias.tolist() == pytest.approx([1.5, 0.5, 2.5, 1.875], abs=1e-5)


def test_a_packed_layer_is_read_but_not_changed(layer: SignatureSurgery) -> None:
    layer.insert_signature(1, concept())
    layer.pack()
    assert layer.is_frozen(1)
    assert layer.get_signature_analysis(1)["zero_count"] == 9
    with pytest.raises(ValueError, match="packed"):
        layer.insert_signature(1, -concept())
    assert len(layer.get_surgery_history()) == 1


def test_a_learned_gate_has_nothing_to_operate_on() -> None:
    with pytest.raises(ValueError, match="LearnedRouter has no signatures to freeze or insert"):
        TriXFFN(WIDTH, NUM_TILES, routing="learned").insert_signature(0, concept())


def test_the_log_holds_only_what_json_can() -> None:
    log = SurgeryLog()
    details: dict[str, Any] = {"with_tile": 3, "share": 0.5}
    log.record("merge", 1, "duplicates", **details)
    assert log.history() == [{"operation": "merge", "tile_idx": 1, "step": 0, "tag": "duplicates", **details}]
    with pytest.raises(TypeError):
        log.record("split", 1, value=torch.ones(1))
    assert len(log.history()) == 1


def test_a_sketch_of_a_layer_can_be_frozen() -> None:
    with torch.device("meta"):
        sketch = FFNConfig(num_tiles=3, signatures="drawn").build(8)
    assert isinstance(sketch, TriXFFN)
    assert [entry["step"] for entry in sketch.get_surgery_history()] == [0]
