"""Checkpoints of our tasks whose network has parts of the user's own, named by class path in the hyperparameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import save_checkpoint, small_network

from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import CheckpointError, LanguageModelTask, load_checkpoint
from trix.nn import FFNConfig, RotaryAttention
from trix.nn.tile_kinds import TernaryTiles


class ScaledAttention(RotaryAttention):
    """Reads a value as it is made, which a tensor without memory does not have."""

    def __init__(self, d_model: int, *, scale: float = 1.0, **settings: Any) -> None:
        super().__init__(d_model, **settings)
        self.scale = torch.full((2,), scale).mean().item()
        if self.scale > 100:
            raise ValueError(f"scale ({self.scale}) must be <= 100")

    def forward(self, *args: Any, **settings: Any) -> Any:
        y_BTD, *rest = super().forward(*args, **settings)
        return self.scale * y_BTD, *rest


class NamedTiles(TernaryTiles):
    def __init__(self, *sizes: int, seed: int = 0) -> None:
        super().__init__(*sizes)
        self.seed = seed


OWN = {"mixer": f"{__name__}.ScaledAttention"}


def task_of(text: TextDataModule, **changes: Any) -> LanguageModelTask:
    torch.manual_seed(0)
    return LanguageModelTask(text.vocabulary, small_network(**changes))


@pytest.fixture
def saved(text: TextDataModule, tmp_path: Path) -> Path:
    return save_checkpoint(task_of(text, **OWN, mixer_args={"scale": 0.25}), text, tmp_path / "own.ckpt")


def test_a_part_that_reads_values_as_it_is_made_is_rebuilt(saved: Path) -> None:
    task, checkpoint = load_checkpoint(saved)
    assert [block.mixer.inner.scale for block in task.network.stack.blocks] == [0.25, 0.25]
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in checkpoint["state_dict"].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer_args": {"scale": 200.0}}, r"hyperparameters of the checkpoint do not fit: scale \(200.0\) must be <= 100"),
        ({"mixer_args": {"colour": 1}}, "hyperparameters of the checkpoint do not fit: .*colour"),
        ({"d_model": 8}, "the checkpoint's weights do not fit the network: size mismatch"),
    ],
)
def test_what_does_not_fit_is_said_of_the_values(saved: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["hyper_parameters"]["network"].update(change)
    torch.save(checkpoint, saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


FFN = {"num_tiles": 4, "tiles": f"{__name__}.NamedTiles"}
ARGUMENTS = {
    "mixer": (OWN | {"mixer_args": {"scale": 0.25}}, OWN, "network.mixer_args"),
    "tiles": ({"ffn": FFNConfig(**FFN, tiles_args={"seed": 3})}, {"ffn": FFNConfig(**FFN)}, "network.ffn.tiles_args"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_other_arguments_of_a_part_are_another_task(name: str, text: TextDataModule, tmp_path: Path) -> None:
    given, default, key = ARGUMENTS[name]
    for one, other in ((given, default), (default, given)):
        path = save_checkpoint(task_of(text, **one), text, tmp_path / "a.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        task_of(text, **one).check_checkpoint(checkpoint)
        with pytest.raises(CheckpointError, match=rf"^{key} \(.*\) must equal the checkpoint's \(.*\)$"):
            task_of(text, **other).check_checkpoint(checkpoint)


def test_a_checkpoint_from_before_there_were_arguments_is_of_the_same_task(text: TextDataModule, tmp_path: Path) -> None:
    checkpoint = torch.load(save_checkpoint(task_of(text), text, tmp_path / "a.ckpt"), weights_only=True)
    network = checkpoint["hyper_parameters"]["network"]
    for values, names in ((network, ["mixer", "mixer_args"]), (network["ffn"], ["tiles", "tiles_args", "routing_args"])):
        for name in names:
            del values[name]
    task_of(text).check_checkpoint(checkpoint)


class Child(LanguageModelTask):
    """Has its parent's name."""


@pytest.mark.parametrize(("one", "other"), [(LanguageModelTask, Child), (Child, LanguageModelTask)])
def test_a_derived_task_is_another_task(
    one: type[LanguageModelTask], other: type[LanguageModelTask], text: TextDataModule, tmp_path: Path
) -> None:
    assert Child.task_name == "language_model"
    checkpoint = torch.load(
        save_checkpoint(one(text.vocabulary, small_network()), text, tmp_path / "a.ckpt"), weights_only=True
    )
    with pytest.raises(CheckpointError, match=rf"class of the task \(.*{other.__name__}\) must equal .*{one.__name__}\)"):
        other(text.vocabulary, small_network()).check_checkpoint(checkpoint)
    del checkpoint["trix"]["task_class"]  # as before class paths were stored
    other(text.vocabulary, small_network()).check_checkpoint(checkpoint)
