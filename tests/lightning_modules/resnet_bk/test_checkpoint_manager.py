"""CheckpointManager: the last few and the best are kept; files are whole, and plain data."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_modules.commands.surgery import is_equal
from lightning_modules.resnet_bk import CheckpointManager
from lightning_modules.tasks.task import CheckpointError


@pytest.fixture
def parts() -> tuple[nn.Module, Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


Parts = tuple[nn.Module, Optimizer]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_is_loaded(parts: Parts, tmp_path: Path) -> None:
    model, optimizer = parts
    manager = CheckpointManager(str(tmp_path / "new" / "folder"))
    manager.save(model, optimizer, epoch=5, metrics={"perplexity": torch.tensor(7.5)})
    checkpoint = manager.load_latest()
    assert (checkpoint["epoch"], checkpoint["metrics"]) == (5, {"perplexity": 7.5})
    fresh = nn.Linear(3, 2)
    fresh.load_state_dict(checkpoint["state_dict"])
    other = AdamW(fresh.parameters())
    other.load_state_dict(checkpoint["optimizer_states"][0])
    assert is_equal(dict(fresh.state_dict()), dict(model.state_dict()))
    assert is_equal(other.state_dict(), optimizer.state_dict())


def test_the_last_and_the_best_are_kept_by_any_process(parts: Parts, tmp_path: Path) -> None:
    values = [5.0, 2.0, math.nan, 4.0, 4.0, 3.0, 3.0]
    for epoch, value in enumerate(values):
        # A manager a process: it knows the folder alone.
        CheckpointManager(tmp_path, keep_last_n=2).save(*parts, epoch, {"perplexity": value, "accuracy": -abs(3 - epoch)})
    assert names(tmp_path) == {f"epoch_{epoch}.ckpt" for epoch in (1, 3, 5, 6)}
    manager = CheckpointManager(tmp_path)
    assert manager.load_latest()["epoch"] == 6
    assert manager.load_best()["epoch"] == 1
    assert manager.load_best("accuracy")["epoch"] == 3


def test_ten_comes_after_nine(parts: Parts, tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    for epoch in (9, 10):
        manager.save(*parts, epoch)
    assert names(tmp_path) == {"epoch_10.ckpt"}


def test_nothing_else_is_removed(parts: Parts, tmp_path: Path) -> None:
    others = {"epoch_0.ckpt.bak", "best.ckpt", "epoch_x.ckpt"}
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "epoch_1.ckpt").symlink_to(tmp_path / "best.ckpt")
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    for epoch in (2, 3):
        manager.save(*parts, epoch)
    assert names(tmp_path) == others | {"elsewhere", "epoch_1.ckpt", "epoch_3.ckpt"}


def test_a_file_stays_as_it_was_where_a_new_one_fails(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(*parts, 0)
    content = (tmp_path / "epoch_0.ckpt").read_bytes()

    def full_disk(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        manager.save(*parts, 0)
    assert (tmp_path / "epoch_0.ckpt").read_bytes() == content
    assert names(tmp_path) == {"epoch_0.ckpt"}


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "metrics": {}, "state_dict": nn.Linear(1, 1)}, tmp_path / "epoch_1.ckpt")
    rule = (
        r"epoch_1.ckpt is not a checkpoint that can be loaded safely: it must hold tensors and plain values only, not torch\.nn"
    )
    with pytest.raises(CheckpointError, match=rule) as caught:
        CheckpointManager(tmp_path).load_latest()
    assert "\n" not in str(caught.value)
    torch.save([1], tmp_path / "epoch_1.ckpt")
    with pytest.raises(CheckpointError, match=r"epoch_1.ckpt must hold epoch, state_dict, optimizer_states and metrics$"):
        CheckpointManager(tmp_path).load_best()


def test_what_is_wrong_is_told_in_a_line(parts: Parts, tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, directions={"bleu": "max"})
    with pytest.raises(CheckpointError, match=r"must hold a checkpoint \(epoch_N.ckpt\)$"):
        manager.load_latest()
    with pytest.raises(CheckpointError, match=r"must have the metric loss: none has any metric$"):
        manager.load_best("loss")
    rule = r"^direction of metric perplexty must be declared, as directions={'perplexty': 'min'}; did you mean perplexity\?$"
    with pytest.raises(ValueError, match=rule):
        manager.save(*parts, 0, {"perplexty": 1.0})
    assert not list(tmp_path.iterdir())
    manager.save(*parts, 0, {"bleu": 1.0})
    with pytest.raises(CheckpointError, match=r"must have the metric perplexity: they have bleu$"):
        manager.load_best()
    with pytest.raises(ValueError, match=r"epoch \(-1\) must be >= 0"):
        manager.save(*parts, -1)
    with pytest.raises(ValueError, match=r"keep_last_n \(0\) must be >= 1"):
        CheckpointManager(tmp_path, keep_last_n=0)
    with pytest.raises(ValueError, match=r"direction of x \('up'\) must be 'min' or 'max'"):
        CheckpointManager(tmp_path, directions={"x": "up"})  # type: ignore[dict-item]
