"""An average of weights has the facts of the trained layer; a deep copy that is no average keeps its own."""

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn, get_swa_multi_avg_fn

from trix.evolution import merge_tiles, raise_k
from trix.nn import HierarchicalTriXFFN, SparseLookupFFN, SparseLookupFFNv2, TriXFFN
from trix.routing import SignatureSurgery

WIDTH, NUM_TILES = 16, 6
LAYERS: dict[str, Callable[[], SignatureSurgery]] = {
    "trix explicit": lambda: TriXFFN(WIDTH, NUM_TILES, routing="explicit"),
    "trix emergent": lambda: TriXFFN(WIDTH, NUM_TILES),
    "hierarchical": lambda: HierarchicalTriXFFN(WIDTH, NUM_TILES, num_probes=2),
    "lookup": lambda: SparseLookupFFN(WIDTH, NUM_TILES),
    "lookup v2": lambda: SparseLookupFFNv2(WIDTH, NUM_TILES),
}
AVERAGES: dict[str, dict[str, Any]] = {
    "swa": {},
    "swa with buffers": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.999)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.999), "use_buffers": True},
    "slow ema": {"avg_fn": get_ema_avg_fn(0.99999), "use_buffers": True},
    "swa one by one": {"avg_fn": get_swa_avg_fn(), "use_buffers": True},
    "swa at once": {"multi_avg_fn": get_swa_multi_avg_fn(), "use_buffers": True},
    "own": {"avg_fn": lambda average, value, _: 0.9 * average + 0.1 * value, "use_buffers": True},
}
DESIGNED = torch.tensor([1.0, -1.0, 0.0, 1.0] * (WIDTH // 4))
FACTS = {"is_frozen_E", "frozen_value_ED", "is_free_E", "log_mass_E", "num_raised", "members_CM", "step", "usage_E", "count_EC"}
FACTS |= {"balance_age_E"}
every_layer = pytest.mark.parametrize("name", LAYERS)


def train(layer: SignatureSurgery, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(32, WIDTH)
    y = layer.train()(x, labels=torch.arange(32) % 3)[0] if isinstance(layer, SparseLookupFFN) else layer.train()(x)
    optimizer.zero_grad()
    (y - x.roll(1, dims=-1)).square().mean().backward()
    optimizer.step()


def facts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.split(".")[-1] in FACTS | {"_extra_state"}}


def assert_facts_equal(one: nn.Module, other: nn.Module) -> None:
    first, second = facts(one.state_dict()), facts(other.state_dict())
    assert first.keys() == second.keys() != set()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


@pytest.mark.parametrize("way", AVERAGES)
@every_layer
def test_an_average_has_the_facts_of_the_trained_layer(name: str, way: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    average = AveragedModel(layer, **AVERAGES[way])
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    for step in range(12):
        train(layer, optimizer)
        if step == 3:
            layer.insert_signature(1, DESIGNED, tag="designed")
        if step == 5:
            layer.remove_tile(2)
            layer.freeze_signature(0)
        if step == 7:
            layer.unfreeze_signature(1)
        if step == 9:
            layer.insert_signature(1, -DESIGNED, tag="again")
        average.update_parameters(layer)
        averaged = average.module
        if step % 2 == 0:  # whether it is read in between or not
            assert averaged.is_frozen(1) == layer.is_frozen(1)
            assert averaged.get_surgery_history() == layer.get_surgery_history()
            assert int(averaged.surgery_log.step) == step + 1
    assert torch.equal(averaged.get_tile_signatures()[1], -DESIGNED)
    assert torch.equal(averaged.get_tile_signatures()[0], layer.get_tile_signatures()[0])
    assert not torch.equal(next(averaged.parameters()), next(layer.parameters()))
    assert_facts_equal(averaged, layer)
    saved = {key.removeprefix("module."): value for key, value in average.state_dict().items()}
    assert [key for key, value in facts(layer.state_dict()).items() if not torch.equal(value, saved[key])] == []


@every_layer
def test_it_has_them_when_the_trained_layer_is_gone(name: str) -> None:
    layer = LAYERS[name]()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    train(layer, optimizer)
    average.update_parameters(layer)
    layer.insert_signature(1, DESIGNED)
    average.update_parameters(layer)
    expected = facts(layer.state_dict())
    del layer, optimizer
    gc.collect()
    assert torch.equal(average.module.get_tile_signatures()[1], DESIGNED)
    found = facts(average.module.state_dict())
    assert [key for key, value in expected.items() if not torch.equal(value, found[key])] == []


def test_an_average_follows_mergers_masses_and_k() -> None:
    layer = TriXFFN(WIDTH, NUM_TILES, routing="explicit")
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    average.update_parameters(layer)
    merge_tiles(layer, 0, 1)
    raise_k(layer)
    average.update_parameters(layer)
    assert average.module.router.top_k == 2
    assert average.module.router.log_mass_E[0].exp().item() == pytest.approx(2.0)
    assert average.module.router.is_free_E.tolist() == [False, True] + [False] * 4
    x = torch.randn(5, WIDTH)
    assert average.module.eval()(x, return_routing=True)[1]["tile_idx"].shape == (5, 2)


@every_layer
def test_a_backup_stays_as_it_was(name: str) -> None:
    layer = LAYERS[name]()
    backup = copy.deepcopy(layer)
    before = {key: value.clone() for key, value in backup.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    train(layer, optimizer)
    layer.insert_signature(1, DESIGNED)
    after = backup.to(torch.float64).to(torch.float32).state_dict()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    layer.load_state_dict(before)
    assert_facts_equal(layer, backup)


@every_layer
def test_a_copy_that_is_trained_has_its_own_facts(name: str) -> None:
    teacher = LAYERS[name]()
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    train(student, optimizer)
    student.insert_signature(1, DESIGNED)
    teacher.insert_signature(2, -DESIGNED)
    # Not even another one's buffers move what the student knows of itself.
    for value, other in zip(student.buffers(), teacher.buffers(), strict=True):
        value.copy_(other)
    assert [student.is_frozen(tile) for tile in range(3)] == [False, True, False]
    assert [teacher.is_frozen(tile) for tile in range(3)] == [False, False, True]
    assert (int(student.surgery_log.step), int(teacher.surgery_log.step)) == (1, 0)


def test_an_average_that_was_loaded_or_moved_goes_on_following() -> None:
    layer = TriXFFN(WIDTH, NUM_TILES, routing="explicit")
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    average.update_parameters(layer)
    layer.freeze_signature(2)
    average.update_parameters(layer)
    average.to(torch.float64).to(torch.float32)
    assert average.module.is_frozen(2)
    state = copy.deepcopy(average.state_dict())
    average.load_state_dict(state)
    layer.load_state_dict({key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"})
    layer.insert_signature(1, DESIGNED)
    average.update_parameters(layer)
    assert torch.equal(average.module.get_tile_signatures()[1], DESIGNED)


def test_evaluating_an_average_does_not_stop_it() -> None:
    layer = SparseLookupFFN(WIDTH, NUM_TILES)
    average = AveragedModel(layer, avg_fn=get_ema_avg_fn(0.999), use_buffers=True)
    for tile_idx in range(4):
        layer.insert_signature(tile_idx, DESIGNED)
        average.update_parameters(layer)
        with torch.inference_mode():
            average(torch.randn(3, WIDTH))  # in training mode, as it was copied
        with torch.inference_mode():
            average.eval()(torch.randn(3, WIDTH))
        assert torch.equal(average.module.get_tile_signatures()[tile_idx], DESIGNED)
        average.train()


def test_an_average_survives_a_pickle() -> None:
    layer = TriXFFN(WIDTH, NUM_TILES)
    average = AveragedModel(layer, use_buffers=True)
    layer.insert_signature(1, DESIGNED)
    average.update_parameters(layer)
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_facts_equal(loaded.module, layer)
    layer.unfreeze_signature(1)
    assert loaded.module.is_frozen(1)
