"""Which checkpoint a run folder stands for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint, checkpoints


def touch(path: Path, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1000 - age, 1000 - age))
    return path


def test_a_path_that_is_no_folder_stands_for_itself(tmp_path: Path) -> None:
    path = touch(tmp_path / "some.ckpt")
    assert best_checkpoint(path) == path
    assert best_checkpoint(tmp_path / "missing.ckpt") == tmp_path / "missing.ckpt"


def test_the_best_of_the_newest_version_that_has_checkpoints(tmp_path: Path) -> None:
    old = touch(tmp_path / "version_2/checkpoints/best.ckpt")
    new = touch(tmp_path / "version_10/checkpoints/best.ckpt", age=9)  # the number counts, not the time
    touch(tmp_path / "version_10/checkpoints/last.ckpt")
    (tmp_path / "version_11").mkdir()
    assert best_checkpoint(tmp_path) == new
    assert best_checkpoint(tmp_path / "version_2") == old
    assert best_checkpoint(tmp_path / "version_2/checkpoints") == old


def test_without_a_best_the_last_without_a_last_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "version_0/checkpoints"
    touch(folder / "step=1.ckpt", age=2)
    newest = touch(folder / "step=2.ckpt", age=1)
    assert best_checkpoint(tmp_path) == newest
    last = touch(folder / "last.ckpt", age=5)
    assert best_checkpoint(tmp_path) == last
    touch(folder / "best.ckpt", age=8)
    best = touch(folder / "best-v1.ckpt", age=7)
    assert best_checkpoint(tmp_path) == best
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step=2.ckpt", "step=1.ckpt", "last.ckpt", "best-v1.ckpt", "best.ckpt"
    ]  # fmt: skip


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "version_0/checkpoints/notes.txt")
    with pytest.raises(UserError, match=r"the folder holds no checkpoint \(\*\.ckpt\)"):
        best_checkpoint(tmp_path)


def test_no_torch_is_loaded() -> None:
    code = "import sys, lightning_modules.run_folder; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
