"""Commands on a classifier of images that routes on codes of their rows: no n-grams, everything else as ever."""

from pathlib import Path

import lightning as L
import pytest
from small_runs import save_checkpoint

from lightning_modules.cli import main
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.tasks import ClassifierTask, load_checkpoint
from trix.introspection import TriXIntrospector
from trix.nn import ClassifierConfig, FFNConfig


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    return DigitsDataModule()


@pytest.fixture(scope="module")
def frame_checkpoint(digits: DigitsDataModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 4 tiles, trained for a step, so that the code has its mean."""
    L.seed_everything(0)
    network = ClassifierConfig(16, 1, 2, context_length=8, ffn=FFNConfig(num_tiles=4, route_on="context"))
    task = ClassifierTask(8, digits.num_classes, digits.class_names, network)
    return save_checkpoint(task, digits, tmp_path_factory.mktemp("frame") / "frame.ckpt")


def test_why_explains_each_row_by_the_dimensions_of_its_code(
    frame_checkpoint: Path, digits: DigitsDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["why", str(frame_checkpoint), "--index", "7"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "decided by  dimension:how much" in out
    lines = out.splitlines()
    task, _ = load_checkpoint(frame_checkpoint)
    assert task.network.context_code.num_centred == 1
    explanations = TriXIntrospector(task.network).why(digits.val_dataloader().dataset.tensors[0][7:8])
    assert len(explanations) == 8
    for line, explanation in zip(lines[2:10], explanations, strict=True):
        dim, much = explanation.decisive_dims[0], explanation.contributions[0]
        assert f" {explanation.tile_idx} " in line
        assert f"{dim}:{much:+.2f}" in line


def test_the_page_and_the_exported_file_need_no_ngrams(
    frame_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "page.html", tmp_path / "frame.onnx"
    assert main(["inspect", str(frame_checkpoint), "--output", str(page), "--num-tokens", "160"]) == 0
    assert "n-gram" not in page.read_text()
    assert main(["export", "--ckpt", str(frame_checkpoint), "--output", str(file)]) == 0
    assert "routed the same 100.00%" in capsys.readouterr().out
    assert main(["inspect", str(file), "--output", str(page)]) == 0
    assert "n-gram" not in page.read_text()


def test_surgery_takes_a_signature_but_no_ngrams(
    frame_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--layer", "0", "--tile", "2", "--tag", "t", "--output", str(tmp_path / "new.ckpt")]
    assert main(["surgery", str(frame_checkpoint), "insert", *where, "--ngrams", "ab"]) == 2
    message = "frame.ckpt: --ngrams needs a model whose tokens are characters, and the task has no vocabulary"
    assert message in capsys.readouterr().err
    assert main(["surgery", str(frame_checkpoint), "insert", *where, "--signature", "+-0+" * 4]) == 0
    task, _ = load_checkpoint(tmp_path / "new.ckpt")
    router = task.network.stack.blocks[0].ffn.router
    assert router.signatures()[2].tolist() == [1, -1, 0, 1] * 4
    assert router.is_frozen(2)
    before, _ = load_checkpoint(frame_checkpoint)
    assert task.network.context_code.mean_F.tolist() == before.network.context_code.mean_F.tolist()
