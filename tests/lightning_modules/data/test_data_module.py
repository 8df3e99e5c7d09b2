"""What is asked of data: held-out examples and a description, of a module of any class."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.data import RunData, TrixDataModule
from lightning_modules.data.data_module import as_numbers, is_sequences
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.errors import DataError, UserError

IMAGES, LABELS = torch.arange(30.0).reshape(5, 2, 3), torch.arange(5)


class Foreign(L.LightningDataModule):
    """Serves what it is given, and notes what it was asked to prepare."""

    def __init__(self, batches: Any, noise: float = 0.5, text: str = "x" * 100) -> None:
        super().__init__()
        self.save_hyperparameters({"noise": noise, "text": text})
        self.batches, self.calls = batches, list[str]()
        self.points_sha256 = "ab12"

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def val_dataloader(self) -> Any:
        return self.batches


class Own(TrixDataModule, Foreign):
    noun = "row"


def data(*tensors: Tensor, kind: type[Foreign] = Foreign, **settings: Any) -> RunData:
    return RunData(lambda: kind(DataLoader(TensorDataset(*tensors), batch_size=2), **settings))


@pytest.mark.parametrize("kind", [Foreign, Own])
@pytest.mark.parametrize(("num_tokens", "num_examples"), [(1, 1), (3, 1), (4, 2), (7, 3), (100, 5)])
def test_held_out_is_the_head_of_the_validation_data(num_tokens: int, num_examples: int, kind: type[Foreign]) -> None:
    inputs, label = data(IMAGES, LABELS, kind=kind).held_out(num_tokens)
    assert torch.equal(inputs, IMAGES[:num_examples])
    assert label is not None
    assert torch.equal(label, LABELS[:num_examples])


def test_an_example_that_is_no_sequence_is_one_token() -> None:
    assert len(data(IMAGES.flatten(1), LABELS).held_out(4).inputs) == 4
    assert [is_sequences(torch.zeros(shape)) for shape in [(5,), (5, 2), (5, 2, 3), (5, 1, 8, 8)]] == [
        False,
        False,
        True,
        False,
    ]
    assert is_sequences(torch.zeros(5, 2, dtype=torch.int64))


def test_batches_may_have_no_label_and_loaders_be_several() -> None:
    inputs, label = RunData(lambda: Foreign([DataLoader(IMAGES, batch_size=2), 5])).held_out(100)
    assert torch.equal(inputs, IMAGES)
    assert label is None


def test_data_is_made_once_and_prepared() -> None:
    made = []

    def make() -> Foreign:
        made.append(Foreign(DataLoader(TensorDataset(IMAGES, LABELS))))
        return made[-1]

    run = RunData(make)
    assert made == []
    run.held_out(1), run.facts(), run.example(4)
    assert [one.calls for one in made] == [["prepare_data", "validate"]]


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        (DataLoader([{"x": 1.0}]), r"a batch of Foreign \(dict\) must be a tensor or \(inputs, label\)"),
        (DataLoader(["text"]), r"a batch of Foreign \(list\) must be"),
        ([[]], r"number of validation batches of Foreign \(0\) must be >= 1"),
    ],
)
def test_other_batches_are_refused(batches: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        RunData(lambda: Foreign(batches)).held_out(3)


def test_data_without_validation_is_refused() -> None:
    with pytest.raises(DataError, match="LightningDataModule must have a val_dataloader"):
        RunData(L.LightningDataModule).held_out(3)


@pytest.mark.parametrize("index", [0, 3, 4])
def test_one_example_is_found_by_its_number(index: int) -> None:
    inputs, label = data(IMAGES, LABELS).example(index)
    assert torch.equal(inputs, IMAGES[index : index + 1])
    assert label is not None
    assert label.tolist() == [index]


@pytest.mark.parametrize("index", [-1, 5])
def test_an_example_that_is_not_there_is_named_as_the_data_does(index: int) -> None:
    with pytest.raises(UserError, match=rf"^--index \({index}\) must be >= 0 and < validation rows \(5\)$"):
        data(IMAGES, LABELS, kind=Own).example(index)


def test_a_description_names_the_class_and_short_settings() -> None:
    assert data(IMAGES, LABELS).facts() == {"data": "validation data of Foreign (noise 0.5)", "points_sha256": "ab12"}
    assert data(IMAGES, LABELS, kind=Own, noise=0.25).facts()["data"] == "validation data of Own (noise 0.25)"
    assert RunData(L.LightningDataModule).facts() == {"data": "validation data of LightningDataModule"}


def test_data_of_ours_says_what_it_is(digits: DigitsDataModule) -> None:
    run = RunData(lambda: digits)
    assert run.facts()["images_sha256"] == digits.images_sha256
    assert "handwritten digits" in run.facts()["data"]
    assert (run.noun, run.is_picture) == ("image", True)
    assert run.written(torch.tensor([[0.0, 1.0], [0.5, 0.0]])) == ["  ##", "::  "]


@pytest.mark.parametrize(
    ("x", "written"),
    [
        (torch.tensor([3, 5]), ["3", "5"]),
        (torch.tensor([0.51239, -2.0]), ["0.512,-2"]),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ["1,2", "3,4"]),
        (torch.arange(10.0), ["0,1,2,3,4,5,6,7,..."]),
        (torch.zeros(1, 8, 8), ["0,0,0,0,0,0,0,0,..."]),
    ],
)
def test_tokens_are_written_by_their_values(x: Tensor, written: list[str]) -> None:
    assert as_numbers(x) == written
