"""ReportPage: a page at the end of a run, about its best checkpoint; and a run that is not lost where there is none."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.callbacks import report_page
from lightning_modules.callbacks.report_page import ReportPage
from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask

SMALL = """\
model:
  class_path: LanguageModelTask
  init_args:
    network: {d_model: 16, num_layers: 1, n_heads: 2, context_length: 8, ffn: {num_tiles: 4}}
data:
  class_path: TextDataModule
  init_args: {path: text.txt, context_length: 8, batch_size: 4, batches_per_epoch: 6}
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: best, monitor: val/loss, mode: max}
"""
PAGE = Path("lightning_logs/version_0/report.html")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("drawn_figures")
def test_the_page_is_about_the_best_checkpoint(folder: Path) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    page = PAGE.read_text()
    assert "best.ckpt" in page
    assert "2 steps" in page  # the loss, of which the highest is kept, falls
    assert "layer 0" in page.lower()


@pytest.mark.parametrize(
    "options",
    [["--report.num_tokens=0"], ["--trainer.logger=false"], ["--trainer.fast_dev_run=1"], ["--model.network.ffn.kind=dense"],
     ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_runs_that_leave_no_page(options: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", *options]) == 0
    assert not list(folder.rglob("*.html"))
    out, err = capfd.readouterr()
    assert "report " not in out
    assert err == ""


def test_a_page_that_cannot_be_drawn_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(report_page, "make_page", fail)
    assert main(["fit", "--config", "small.yaml"]) == 0
    assert not PAGE.exists()
    assert capfd.readouterr().err == "trix: warning: report.html could not be drawn: a bug of two lines\n"


def test_a_negative_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_tokens \(-1\) must be >= 0"):
        ReportPage(-1)


def test_only_modules_of_the_run_are_trusted(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[list[str]] = []

    def load(path: Path, modules: list[str]) -> None:
        trusted.append(modules)
        raise ValueError("seen")

    monkeypatch.setattr(report_page, "load_checkpoint", load)
    for data in (
        {"datamodule": text},
        {"train_dataloaders": text.train_dataloader(), "val_dataloaders": text.val_dataloader()},
    ):
        trainer = make_trainer(callbacks=[ReportPage(), ModelCheckpoint()], logger=True, enable_checkpointing=True)
        trainer.fit(language_model, **data)
    tasks = "lightning_modules.tasks.language_model"
    assert trusted == [[tasks, "lightning_modules.data.text"], [tasks]]
