"""The balance bias comes to rest, with no worse load than that of a constant step."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trix.evolution import reseed_tile, split_tile
from trix.nn import ContextCode, GatedFFN, HashFFN, HierarchicalTriXFFN, SparseLookupFFN, TriXFFN
from trix.routing import SignatureRouter, SignatureSurgery
from trix.routing.balance import step_at, tile_load

# How often each of the 65 characters stands in a text of plays, in 10 000.
# fmt: off
FREQUENCIES = (
    1523, 848, 601, 590, 498, 460, 446, 438, 435, 408, 359, 299, 281, 238, 199, 183, 178, 158, 141, 140, 120,
    106, 101, 97, 92, 71, 70, 70, 64, 63, 55, 54, 49, 46, 44, 41, 35, 34, 33, 32, 30, 28, 25, 25, 22, 22, 19,
    19, 17, 16, 15, 15, 14, 7, 6, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1,
)
# fmt: on
BATCH, NUM_UPDATES = 2048, 200


def characters(num_tokens: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(torch.tensor(FREQUENCIES, dtype=torch.float64), num_tokens, True, generator=generator)


def codes(width: int, seed: int, is_pair: bool) -> Callable[[Tensor], Tensor]:
    """What the router reads of characters: normalised random embeddings, or codes of them and the character before."""
    if not is_pair:
        table = F.rms_norm(torch.randn(65, width, generator=torch.Generator().manual_seed(seed)), (width,))
        return lambda token: table[token]
    code = ContextCode(65, width)
    return lambda token: code(token.unsqueeze(0))[0][0]


@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("num_tiles", [16, 64])
def test_fixed_inputs_of_a_text_stay_in_their_tiles(num_tiles: int, width: int, is_pair: bool) -> None:
    torch.manual_seed(1)  # another than that of the codes
    generator = torch.Generator().manual_seed(100)
    routers = {"at rest": SignatureRouter(width, num_tiles)}
    routers["for ever"] = copy.deepcopy(routers["at rest"])
    read, probe, changed, load = codes(width, 0, is_pair), characters(8192, generator), {}, {}
    for name, router in routers.items():
        loads = []
        for step in range(2 * NUM_UPDATES):
            if step == NUM_UPDATES:
                before = router(read(probe)).tile_idx
            router.update_balance(router(read(characters(BATCH, generator))).tile_idx)
            if name == "for ever":
                router.balance_age_E.zero_()  # a constant step
            if step >= NUM_UPDATES and step % 20 == 0:
                loads.append(tile_load(router(read(probe)).tile_idx, num_tiles).max())
        changed[name] = (router(read(probe)).tile_idx != before).float().mean().item()
        load[name] = torch.stack(loads).mean().item()
    assert changed["at rest"] < 0.01
    assert load["at rest"] < 1.25 * load["for ever"]


def test_a_constant_step_would_not_rest() -> None:
    """So that the test above tests something."""
    router = SignatureRouter(64, 16)
    generator = torch.Generator().manual_seed(0)
    read, tiles = codes(64, 0, False), []
    for _ in range(300):
        router.update_balance(router(read(characters(BATCH, generator))).tile_idx)
        router.balance_age_E.zero_()
        tiles.append(router(read(torch.arange(65))).tile_idx)
    share = torch.tensor(FREQUENCIES) / sum(FREQUENCIES)
    assert share[(torch.cat(tiles[200:], dim=1) != tiles[200]).any(dim=1)].sum() > 0.05


def test_the_step_is_full_then_falls_to_exactly_0() -> None:
    age = torch.tensor([0.0, 99.0, 100.0, 150.0, 199.0, 200.0, 1e6])
    assert step_at(age).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.01, 0.0, 0.0])
    router = SignatureRouter(8, 3)
    router.balance_age_E.copy_(torch.tensor([0.0, 150.0, 200.0]))
    router.update_balance(torch.tensor([[0], [0], [0]]))
    assert router.balance_bias.tolist() == pytest.approx([-0.01, 0.005, 0.0])
    assert router.balance_age_E.tolist() == [1.0, 151.0, 201.0]


def test_batches_that_wait_for_one_another_are_counted_one_by_one() -> None:
    router = SignatureRouter(8, 3)
    for tile_idx in (0, 0, 1):
        router.add_batch(torch.full((4, 1), tile_idx))
    assert router.balance_bias.tolist() == router.balance_age_E.tolist() == [0.0] * 3
    state = {name: value.clone() for name, value in router.state_dict().items()}
    router.settle()
    assert router.balance_bias.tolist() == pytest.approx([-0.01, 0.01, 0.03])
    assert router.balance_age_E.tolist() == [3.0] * 3
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())


def test_the_factor_of_a_training_scales_the_step_and_the_age() -> None:
    router = SignatureRouter(8, 2)
    router.step_factor.fill_(0.25)
    router.update_balance(torch.zeros(4, 1, dtype=torch.int64))
    assert router.balance_bias.tolist() == pytest.approx([-0.0025, 0.0025])
    assert router.balance_age_E.tolist() == [0.25, 0.25]
    assert copy.deepcopy(router).step_factor == 0.25
    assert "step_factor" not in router.state_dict()


def test_a_frozen_tile_gets_the_mean_of_the_moves_as_they_are() -> None:
    router = SignatureRouter(8, 4)
    router.freeze(0)
    router.balance_age_E.copy_(torch.tensor([200.0, 200.0, 200.0, 0.0]))
    router.update_balance(torch.zeros(4, 1, dtype=torch.int64))
    assert router.balance_bias.tolist() == pytest.approx([0.0025, 0.0, 0.0, 0.01])


def test_where_all_tiles_are_frozen_the_load_is_leveled_but_not_that_of_an_inserted_one() -> None:
    torch.manual_seed(0)
    router, generator = SignatureRouter(64, 16), torch.Generator().manual_seed(0)
    router.freeze_all()
    router.insert(3, router.signatures()[3])
    read, probe, loads = codes(64, 0, is_pair=True), characters(8192, generator), []
    for _ in range(2):
        loads.append(tile_load(router(read(probe)).tile_idx, 16))
        for _ in range(20):
            router.update_balance(router(read(characters(BATCH, generator))).tile_idx)
    assert loads[1].max() < 0.7 * loads[0].max()
    assert torch.equal(tile_load(router(read(probe)).tile_idx, 16), loads[1])  # at rest after 20 batches
    others_E = torch.arange(16) != 3
    held, mean = router.balance_bias[3], router.balance_bias[others_E].mean()
    assert (router.balance_bias[others_E] - mean).abs().max() > 0.5
    assert (held - mean).abs() < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_where_all_tiles_are_frozen_none_stays_empty(seed: int) -> None:
    torch.manual_seed(seed)
    router, generator = SignatureRouter(128, 64), torch.Generator().manual_seed(seed)
    router.freeze_all()
    read, probe = codes(128, seed, is_pair=True), characters(65536, generator)
    assert (tile_load(router(read(probe)).tile_idx, 64) < 0.1 / 64).any()
    for _ in range(20):
        router.update_balance(router(read(characters(BATCH, generator))).tile_idx)
    assert (tile_load(router(read(probe)).tile_idx, 64) > 0.1 / 64).all()


def test_a_tile_that_surgery_puts_in_use_starts_anew() -> None:
    layer = TriXFFN(8, 5, routing="explicit")
    layer.router.balance_age_E.fill_(300.0)
    layer.insert_signature(0, torch.ones(8), freeze=False)
    reseed_tile(layer, 1)
    split_tile(layer, 2, 3)
    assert layer.router.balance_age_E.tolist() == [0.0, 0.0, 0.0, 0.0, 300.0]
    layer.freeze_signature(4)
    layer.unfreeze_signature(4)
    assert layer.router.balance_age_E[4] == 300.0


LAYERS: dict[str, Callable[[], SignatureSurgery]] = {
    "explicit": lambda: TriXFFN(8, 4, routing="explicit"),
    "emergent": lambda: TriXFFN(8, 4),
    "scattering": lambda: TriXFFN(8, 4, routing="scattering", routing_args={"edge_rate": 0.5}),
    "hierarchical": lambda: HierarchicalTriXFFN(8, 4),
    "lookup": lambda: SparseLookupFFN(8, 4),
    "learned": lambda: GatedFFN(8, 4),
    "hash": lambda: HashFFN(8, 4),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_file_of_before_the_bias_came_to_rest_loads(name: str, strict: bool, assign: bool) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    layer.router.balance_bias.copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    other.router.balance_age_E.fill_(7.0)
    state = layer.state_dict()
    assert state.pop("router.balance_age_E").tolist() == [0.0] * 4
    names = set(state)
    other.load_state_dict(state, strict=strict, assign=assign)
    assert set(state) == names  # the caller's own
    assert other.router.balance_age_E.tolist() == [0.0] * 4
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in other.state_dict().items())


def test_the_age_is_kept_and_a_forged_one_refused() -> None:
    router, other = SignatureRouter(8, 4), SignatureRouter(8, 4)
    for _ in range(3):
        router.update_balance(torch.zeros(4, 1, dtype=torch.int64))
    other.load_state_dict(router.state_dict())
    assert other.balance_age_E.tolist() == [3.0] * 4
    for value, message in (
        (-1.0, r"balance_age_E \(-1\) must be >= 0"),
        (float("nan"), r"balance_age_E \(nan\) must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(router.state_dict() | {"balance_age_E": torch.full((4,), value)})


def test_a_compiled_layer_heeds_the_factor_without_another_compilation() -> None:
    layer = TriXFFN(8, 4, routing="explicit", balance_rate=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(layer, backend=counter), torch.randn(6, 8)
    with torch.no_grad():
        compiled(x)
        num_frames, moves = counter.frame_count, []
        for factor in (1.0, 0.5, 0.25):
            layer.router.step_factor.fill_(factor)
            before = layer.router.balance_bias.clone()
            compiled(x)
            moves.append(float((layer.router.balance_bias - before).abs().max()))
    assert moves == pytest.approx([0.5, 0.25, 0.125])
    assert counter.frame_count == num_frames
