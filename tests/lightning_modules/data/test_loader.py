"""The loader's place: what an iterator serves after a start, a stop, a restored state, in a trainer's epoch."""

from types import SimpleNamespace
from typing import cast

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.data.loader import ResumableLoader, evaluation_loader, rank_and_world_size
from lightning_modules.errors import DataError

NUM_BATCHES = 4


def make_loader(num_batches: int = NUM_BATCHES, trainer: L.Trainer | None = None) -> ResumableLoader[tuple[int, int]]:
    return ResumableLoader(lambda epoch, batch_idx: (epoch, batch_idx), num_batches, {"seed": 0}, trainer)


def trainer_in(epoch: int, overfit_batches: int = 0) -> L.Trainer:
    """As much of a trainer as the loader reads."""
    return cast(L.Trainer, SimpleNamespace(current_epoch=epoch, overfit_batches=overfit_batches))


def test_each_iterator_serves_the_next_epoch() -> None:
    loader = make_loader()
    assert len(loader) == NUM_BATCHES
    assert list(loader) == [(0, i) for i in range(NUM_BATCHES)]
    assert list(loader) == [(1, i) for i in range(NUM_BATCHES)]


def test_an_iterator_that_is_never_advanced_costs_no_epoch() -> None:
    loader = make_loader()
    iter(loader)
    assert next(iter(loader)) == (0, 0)


@given(num_batches=st.integers(1, 7), num_epochs=st.integers(1, 3), data=st.data())
def test_restored_state_continues_the_uninterrupted_order(num_batches: int, num_epochs: int, data: st.DataObject) -> None:
    uninterrupted = make_loader(num_batches)
    expected = [place for _ in range(num_epochs + 1) for place in uninterrupted]

    stop = data.draw(st.integers(1, num_batches * num_epochs))
    first, seen = make_loader(num_batches), []
    while len(seen) < stop:
        for place in first:
            seen.append(place)
            if len(seen) == stop:
                break
    second = make_loader(num_batches)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen.extend(second)
    assert seen == expected


def test_state_restored_before_the_first_batch_starts_at_the_first_batch() -> None:
    loader = make_loader()
    loader.load_state_dict(make_loader().state_dict())
    assert next(iter(loader)) == (0, 0)


def test_place_inside_the_trainers_epoch_is_kept_and_left_for_another() -> None:
    state = {"epoch": 2, "num_served": 3, "settings": {"seed": 0}}
    same, other = make_loader(trainer=trainer_in(epoch=2)), make_loader(trainer=trainer_in(epoch=3))
    same.load_state_dict(state)
    assert list(same) == [(2, 3)]
    assert next(iter(same)) == (2, 0)
    other.load_state_dict(state)
    assert next(iter(other)) == (3, 0)


def test_fresh_loader_starts_in_the_trainers_epoch() -> None:
    assert next(iter(make_loader(trainer=trainer_in(epoch=5)))) == (5, 0)


def test_overfitting_serves_epoch_zero_again() -> None:
    trainer = trainer_in(epoch=1, overfit_batches=2)
    assert list(make_loader(trainer=trainer)) == [(0, i) for i in range(NUM_BATCHES)]


def test_changed_settings_are_told_on_resume() -> None:
    state = ResumableLoader(lambda epoch, _: epoch, 4, {"seed": 1, "batch_size": 8}).state_dict()
    loader = ResumableLoader(lambda epoch, _: epoch, 4, {"seed": 1, "batch_size": 16})
    with pytest.warns(UserWarning, match=r"batch_size is 16, was 8$"):
        loader.load_state_dict(state)


def test_state_does_not_share_memory_with_the_loader() -> None:
    loader = make_loader()
    loader.state_dict()["settings"]["seed"] = 5
    assert loader.state_dict()["settings"] == {"seed": 0}


def test_evaluation_loader_serves_every_pair_once_in_order() -> None:
    input_N, target_N = torch.arange(7), torch.arange(7) * 10
    batches = list(evaluation_loader(input_N, target_N, batch_size=3))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), input_N)
    assert torch.equal(torch.cat([targets for _, targets in batches]), target_N)


def test_one_process_outside_a_process_group() -> None:
    assert rank_and_world_size() == (0, 1)


@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 8), world_size=st.integers(1, 4))
def test_processes_share_an_evaluation_without_repeats_in_equal_numbers_of_batches(
    num_examples: int, batch_size: int, world_size: int
) -> None:
    examples, seen, num_batches = torch.arange(num_examples), [], set()
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_modules.data.loader.rank_and_world_size", lambda rank=rank: (rank, world_size))
            if num_examples < world_size:
                with pytest.raises(DataError, match=rf"processes \({world_size}\) must be <= .* \({num_examples}\)"):
                    evaluation_loader(examples, examples, batch_size)
                return
            batches = [inputs.tolist() for inputs, _ in evaluation_loader(examples, examples, batch_size)]
        num_batches.add(len(batches))
        seen += [example for batch in batches for example in batch]
    assert sorted(seen) == list(range(num_examples))
    assert len(num_batches) == 1
