"""Honest files of a small run, and commands on files that are not: one line, exit code 2, and every file as it was."""

import re
from pathlib import Path

import lightning as L
import pytest
from limited_memory import limited_memory
from small_runs import SENTENCE, save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask

WHERE = ["--layer", "0", "--tile", "0", "--tag", "t", "--output"]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an honest run leaves: a checkpoint, the model exported from it, and its text."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    L.seed_everything(0)
    save_checkpoint(LanguageModelTask(text.vocabulary, small_network()), text, folder / "lm.ckpt")
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(folder / "lm.onnx")]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def assert_refused(arguments: list[str], problem: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = state_of(folder)
    capfd.readouterr()
    with limited_memory():
        assert main(arguments) == 2, arguments
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if "[E:onnxruntime" not in line]  # its own log of what it cannot run
    assert len(lines) == 1, (arguments, err)
    assert re.match(f"trix: error: .*{problem}", lines[0]), (arguments, lines[0])
    assert state_of(folder) == before


def commands_on(ckpt: str) -> list[list[str]]:
    return [
        ["inspect", ckpt],
        ["why", ckpt, "--prompt", "The "],
        ["export", "--ckpt", ckpt, "--output", "new/model.onnx"],
        ["surgery", ckpt, "freeze", *WHERE, "new/edited.ckpt"],
    ]


def commands_on_model(model: str) -> list[list[str]]:
    return [
        ["inspect", model],
        ["generate", model, "--prompt", "The ", "--num-tokens", "3"],
        ["bench", model, "--threads", "1", "--lengths", "4"],
        ["surgery", model, "freeze", *WHERE, "new/edited.onnx"],
    ]
