"""RunRecord: what a run leaves beside its configuration, and that its configuration repeats it."""

import csv
import json
import platform
import re
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.callbacks.run_record import MetricsLogger, data_digests, read_metrics
from lightning_modules.cli import main
from lightning_modules.data.corpora import load_file
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.language_id import LanguageIdDataModule

SMALL = """\
model:
  class_path: LanguageModelTask
  init_args:
    network: {d_model: 16, num_layers: 1, n_heads: 2, context_length: 8, dropout: 0.1, ffn: {num_tiles: 4}}
data:
  class_path: TextDataModule
  init_args: {path: text.txt, context_length: 8, batch_size: 4, batches_per_epoch: 6}
trainer:
  accelerator: cpu
  max_steps: 6
  val_check_interval: 3
  log_every_n_steps: 2
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: best, monitor: val/loss}
report: {num_tokens: 0}
"""
RUN = Path("lightning_logs/version_0")
LAST = Path("checkpoints/last.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_configuration_of_a_run_repeats_it_bit_for_bit(folder: Path) -> None:
    assert main(["fit", "--config", "small.yaml", "--seed_everything=5", "--model.optimizer.lr=0.01"]) == 0
    content = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert main(["fit", "--config", str(RUN / "config.yaml")]) == 0
    assert {path: path.read_bytes() for path in content} == content
    other = RUN.with_name("version_1")
    for name in ("best", "last"):
        first, again = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for run in (RUN, other))
        assert again["global_step"] == first["global_step"] > 0
        assert [key for key, value in first["state_dict"].items() if not torch.equal(value, again["state_dict"][key])] == []
    assert (other / "metrics.csv").read_bytes() == (RUN / "metrics.csv").read_bytes()
    assert yaml.safe_load((other / "config.yaml").read_text()) == yaml.safe_load((RUN / "config.yaml").read_text())
    # And it is that configuration which decides.
    assert main(["fit", "--config", "small.yaml"]) == 0
    assert (RUN.with_name("version_2") / "metrics.csv").read_bytes() != (RUN / "metrics.csv").read_bytes()


def test_environment_says_what_ran_where(folder: Path) -> None:
    arguments = ["fit", "--config", "small.yaml", "--trainer.max_steps=3"]
    assert main(arguments) == 0
    found = json.loads((RUN / "environment.json").read_text())
    assert found["arguments"] == arguments
    assert found["resumed_from"] is None
    assert found["folder"] == str(folder)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"].keys() == {"trix", "torch", "lightning", "numpy"}
    assert found["num_threads"] == torch.get_num_threads()
    assert found["platform"] == platform.platform()
    assert found["cpu"]
    assert found["git"] is None
    assert found["data"] == {"class": "TextDataModule", "text_sha256": load_file("text.txt").sha256}

    arguments = ["fit", "--resume", "lightning_logs", "--config", "small.yaml"]
    assert main(arguments) == 0
    resumed = json.loads((RUN.with_name("version_1") / "environment.json").read_text())
    assert resumed["resumed_from"] == str(RUN / LAST)
    assert resumed["arguments"] == arguments


def test_every_data_module_has_a_digest() -> None:
    for data in (DigitsDataModule(), LanguageIdDataModule(min_length=120)):
        name, digest = data_digests(data).values()
        assert name == type(data).__name__
        assert re.fullmatch("[0-9a-f]{64}", digest)


def test_metrics_are_those_of_tensorboard(folder: Path) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    rows = read_metrics(RUN / "metrics.csv")
    events = EventAccumulator(str(RUN)).Reload()
    for name in ("train/loss", "val/loss", "val/perplexity"):
        expected = [(event.step, event.value) for event in events.Scalars(name)]
        assert [(row["step"], pytest.approx(row[name])) for row in rows if name in row] == expected, name
        assert len(expected) >= 2


@pytest.mark.parametrize("option", ["--trainer.logger=false", "--trainer.fast_dev_run=1"])
def test_a_run_without_logs_leaves_no_record(option: str, folder: Path) -> None:
    assert main(["fit", "--config", "small.yaml", option]) == 0
    assert not list(folder.rglob("metrics.csv"))
    assert not list(folder.rglob("environment.json"))


def test_a_csv_logger_of_the_user_is_the_only_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: mine}}"
    assert main(["fit", "--config", "small.yaml", logger]) == 0
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.csv")] == ["mine/lightning_logs/version_0/metrics.csv"]
    assert (folder / "mine/lightning_logs/version_0/environment.json").is_file()


def test_earlier_rows_are_taken_over_once_and_as_they_were(tmp_path: Path) -> None:
    earlier = MetricsLogger(tmp_path / "earlier")
    for step, values in ((1, {"a": 0.1, "epoch": 0}), (2, {"b": 1e-07}), (2, {"a": float("nan")}), (3, {"a": 0.3})):
        earlier.log_metrics(values, step)
    path = tmp_path / "earlier" / "metrics.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    with path.open("a") as file:
        file.write("0.4,0,1e-")  # a kill cut this row short

    logger = MetricsLogger(tmp_path / "later")
    logger.take_over(read_metrics(path), last_step=2)
    logger.log_metrics({"b": 5.0}, 2)  # was there already
    logger.log_metrics({"b": 6.0}, 3)
    later = list(csv.DictReader((tmp_path / "later" / "metrics.csv").read_text().splitlines()))
    assert later[:3] == rows[:3]
    assert [row["b"] for row in later[3:]] == ["6.0"]
    assert read_metrics(tmp_path / "missing.csv") == []
