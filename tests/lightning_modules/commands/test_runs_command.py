"""``trix runs``: what it lists is what the event files hold; a mistake gives one line."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from gone_reader import run_without_reader
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_modules.cli import main
from lightning_modules.commands.runs import find_runs, sort_runs

CLOCK_S = 0.05  # longer than the steps in which file systems tell the time


def log_run(root: Path, name: str, metrics: Mapping[str, Sequence[float]]) -> Path:
    """One more version of a run, whose metrics are logged at steps 9, 19, ..."""
    time.sleep(CLOCK_S)
    logger = TensorBoardLogger(root, name=name, default_hp_metric=False)
    for metric, values in metrics.items():
        for index, value in enumerate(values):
            logger.log_metrics({metric: value}, step=10 * index + 9)
    logger.experiment.close()
    time.sleep(CLOCK_S)
    return Path(logger.log_dir)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two versions of a run, each with a checkpoint, a run that validates nothing, and one that has only begun."""
    root = tmp_path / "runs"
    log_run(root, "lm", {"val/loss": [3.0, 2.0, 2.5], "val/accuracy": [0.5, 0.9, 0.8], "routing/entropy": [1.0]})
    (root / "lm" / "old.ckpt").touch()
    log_run(root, "lm", {"val/loss": [1.5], "val/accuracy": [0.7]})
    (root / "lm" / "best.ckpt").touch()
    (root / "lm" / "last.ckpt").touch()
    inner = log_run(root / "more", "train_only", {"train/loss": [4.0, 3.5]})
    (inner / "checkpoints").mkdir()
    (inner / "checkpoints" / "epoch=0.ckpt").touch()
    log_run(root, "begun", {})
    return root


def rows(printed: str) -> list[list[str]]:
    """The cells of each line, by two spaces or more."""
    return [re.split(r" {2,}", line.strip()) for line in printed.splitlines()]


def test_runs_are_listed_in_the_order_in_which_they_began(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(root)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out  # plain where it is piped
    header, *lines = rows(out)
    assert header == [
        *("run", "version", "began", "last step"),
        *("lowest val/loss", "last val/loss", "last val/accuracy", "checkpoints"),
    ]
    assert [line[:2] + line[3:] for line in lines] == [
        ["lm", "0", "29", "2", "2.5", "0.8", f"{root}/lm/old.ckpt"],
        ["lm", "1", "9", "1.5", "1.5", "0.7", f"{root}/lm/best.ckpt {root}/lm/last.ckpt"],
        ["more/train_only", "0", "19", "-", "-", "-", f"{root}/more/train_only/version_0/checkpoints/epoch=0.ckpt"],
        ["begun", "0", "-", "-", "-", "-", "-"],
    ]
    assert all(line[2].startswith(time.strftime("%Y-")) for line in lines)


@pytest.mark.parametrize(
    ("options", "versions", "columns"),
    [
        (["--sort", "val/loss"], ["1", "0", "0", "0"], ["lowest val/loss", "last val/loss", "last val/accuracy"]),
        (
            ["--sort", "val/accuracy", "--descending"],
            ["0", "1", "0", "0"],
            ["highest val/accuracy", "last val/accuracy", "last val/loss"],
        ),
    ],
)
def test_runs_can_be_sorted(
    options: list[str], versions: list[str], columns: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(root), *options]) == 0
    header, *lines = rows(capsys.readouterr().out)
    assert header[4:-1] == columns
    assert [line[1] for line in lines] == versions
    assert [line[0] for line in lines] == ["lm", "lm", "more/train_only", "begun"]


def test_json_holds_every_metric(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(root), "--json"]) == 0
    first, *_, last = json.loads(capsys.readouterr().out)
    assert set(first["metrics"]) == {"val/loss", "val/accuracy", "routing/entropy"}
    assert first["metrics"]["val/loss"] == {"last": 2.5, "min": 2.0, "max": 3.0}
    assert (first["name"], first["version"], first["step"]) == ("lm", 0, 29)
    assert first["folder"] == str(root / "lm" / "version_0")
    assert first["checkpoints"] == [str(root / "lm" / "old.ckpt")]
    assert (last["name"], last["step"], last["metrics"], last["checkpoints"]) == ("begun", None, {}, [])


def test_values_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_run(tmp_path, "diverged", {"val/loss": [2.0, math.nan]})
    log_run(tmp_path, "lost", {"val/loss": [math.nan]})
    log_run(tmp_path, "good", {"val/loss": [3.0]})
    runs = sort_runs(find_runs(tmp_path), "val/loss", is_descending=False)
    assert [run.name for run in runs] == ["diverged", "good", "lost"]
    assert [run.name for run in sort_runs(runs, "val/loss", is_descending=True)] == ["good", "diverged", "lost"]
    assert main(["runs", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)[1][4:6] == ["2", "nan"]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    values = {run["name"]: run["metrics"]["val/loss"] for run in json.loads(capsys.readouterr().out)}
    assert values["diverged"] == {"last": None, "min": 2.0, "max": 2.0}
    assert values["lost"] == {"last": None, "min": None, "max": None}


def test_a_file_that_is_cut_short_gives_what_it_holds(root: Path) -> None:
    (events,) = (root / "lm" / "version_0").glob("events*")
    events.write_bytes(events.read_bytes()[:-10])
    run = find_runs(root)[0]
    assert run.metrics["val/loss"].last == 2.5
    assert "routing/entropy" not in run.metrics  # logged last


def test_an_empty_file_is_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "version_3").mkdir()
    (tmp_path / "version_3" / "events.out.tfevents.1.host.1.0").touch()
    (run,) = find_runs(tmp_path)
    assert (run.name, run.version, run.start, run.step, run.metrics) == (tmp_path.name, 3, None, None, {})


def test_the_folder_is_runs_unless_told_otherwise(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root.parent)
    assert main(["runs"]) == 0
    assert "  runs/lm/best.ckpt runs/lm/last.ckpt" in capsys.readouterr().out
    monkeypatch.chdir(root / "lm" / "version_1")
    assert main(["runs", "."]) == 0
    assert rows(capsys.readouterr().out)[1][:2] == ["lm", "1"]


MISTAKES = [
    (["{root}/missing"], "folder {root}/missing must exist: `trix fit` makes one for its runs"),
    (["{root}/lm/best.ckpt"], "folder {root}/lm/best.ckpt must be a folder, not a file"),
    (["{root}/empty"], "folder {root}/empty must hold a run: there are no TensorBoard files (events.out.tfevents.*) below it"),
    (["{root}", "--sort", "val/los"], "--sort (val/los) must be a metric of a run; did you mean val/loss?"),
    (
        ["{root}", "--sort", "x"],
        "--sort (x) must be a metric of a run; there are: routing/entropy, train/loss, val/accuracy, val/loss",
    ),
    (["{root}", "--descending"], "--descending needs a metric to sort by: --sort METRIC"),
    (["{root}", "--sorted"], "unknown option --sorted of `trix runs`; did you mean --sort?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line(arguments: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    assert main(["runs", *(text.format(root=root) for text in arguments)]) == 2
    assert capsys.readouterr() == ("", f"trix: error: {message.format(root=root)}\n")


def test_it_loads_nothing_heavy_and_a_reader_that_has_gone_is_no_error(root: Path) -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = [name for name in ('torch', 'lightning', 'tensorflow', 'trix.nn') if name in sys.modules]\n"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    assert run_without_reader(code, ["runs", str(root)]) == (0, "")
