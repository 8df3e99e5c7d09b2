"""Checkpoints of version 1 load, and a run that wrote one goes on from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MakeTrainer, small_network

from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_checkpoint, read_checkpoint
from trix.nn import FFNConfig, LanguageModel, TriXStack
from trix.nn.block import renamed_from_version_1

# The names of a block's parameters in version 1, in the order in which an optimizer met them.
TILES_1 = (
    "attention_norm.weight",
    "attention.qkv.weight",
    "attention.out.weight",
    "ffn.router.raw_signatures",
    "ffn.tiles.up.weight",
    "ffn.tiles.down.weight",
    "ffn_norm.weight",
)
DENSE_1 = (*TILES_1[:3], "ffn.up.weight", "ffn.down.weight", "ffn_norm.weight")


def version_1(name: str) -> str:
    """The name that a weight had."""
    for new, old in (
        (".mixer.norm.", ".attention_norm."),
        (".mixer.inner.", ".attention."),
        (".feed_forward.norm.", ".ffn_norm."),
        (".feed_forward.inner.", ".ffn."),
        (".feed_forward.", ".ffn."),
    ):
        if new in name and not (new == ".feed_forward.norm." and name.endswith(".bias")):
            return name.replace(new, old)
    return name


@pytest.mark.parametrize(
    ("ffn", "names"),
    [(FFNConfig(num_tiles=4), TILES_1), (FFNConfig(kind="dense"), DENSE_1), (FFNConfig(kind="none"), TILES_1[:3])],
)
def test_every_name_of_version_1_has_its_present_one_in_the_same_place(ffn: FFNConfig, names: tuple[str, ...]) -> None:
    stack = TriXStack(2, 16, 2, ffn)
    found = renamed_from_version_1({f"network.blocks.{block}.{name}": None for block in range(2) for name in names})
    assert list(found) == [f"network.{name}" for name, _ in stack.named_parameters()]


def test_a_sparse_lookup_is_a_sublayer_itself() -> None:
    stack = TriXStack(1, 16, 2, FFNConfig(kind="sparse_lookup", num_tiles=4))
    old = {
        name.replace("mixer.norm", "attention_norm").replace("mixer.inner", "attention").replace("feed_forward.", "ffn."): value
        for name, value in stack.state_dict().items()
    }
    assert list(renamed_from_version_1(old)) == list(stack.state_dict())


def test_names_outside_blocks_stay() -> None:
    names = {"network.embedding.weight": 1, "attention_norm.weight": 2, "blocks.x.ffn.up": 3}
    assert renamed_from_version_1(names) == names


def as_version_1(path: Path, target: Path) -> None:
    """The file that the version before would have written."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {version_1(name): value for name, value in checkpoint["state_dict"].items()}
    checkpoint["trix"] = {name: checkpoint["trix"][name] for name in ("task", "data", "max_steps")} | {"version": 1}
    network = checkpoint["hyper_parameters"]["network"]
    for name in ("mixer", "mixer_args", "attention_at"):
        del network[name]
    for name in ("tiles", "tiles_args", "routing_args"):
        del network["ffn"][name]
    torch.save(checkpoint, target)


def test_a_run_of_version_1_goes_on_to_the_very_weights(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    torch.manual_seed(0)
    data = TextDataModule(context_length=8)
    task = LanguageModelTask(data.vocabulary, small_network())
    short = make_trainer(limit_val_batches=0)
    short.fit(task, data)
    short.save_checkpoint(tmp_path / "now.ckpt")
    as_version_1(tmp_path / "now.ckpt", tmp_path / "old.ckpt")
    assert any(".attention_norm." in name for name in torch.load(tmp_path / "old.ckpt", weights_only=True)["state_dict"])
    loaded, checkpoint = load_checkpoint(tmp_path / "old.ckpt")
    assert isinstance(loaded.network, LanguageModel)
    assert checkpoint["trix"]["version"] == read_checkpoint(tmp_path / "now.ckpt")["trix"]["version"] == 2
    for name, value in task.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    ends = []
    for name in ("now.ckpt", "old.ckpt"):
        again = LanguageModelTask(data.vocabulary, small_network())
        longer = make_trainer(max_steps=4, limit_val_batches=0)
        longer.fit(again, TextDataModule(context_length=8), ckpt_path=tmp_path / name, weights_only=True)
        ends.append(again.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
