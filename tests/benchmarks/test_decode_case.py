"""The benchmark of generation: all contenders are one model, and their speed and memory are recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


@pytest.mark.usefixtures("native_library")
def test_all_contenders_answer_alike_and_are_measured(tmp_path: Path) -> None:
    sizes = ["--d-model", "64", "--layers", "1", "--tiles", "4", "--past", "3", "--threads", "1", "--repeats", "5"]
    context = ["--context-d-model", "32", "--context-layers", "2", "--context-tiles", "4", "--context-turns", "5"]
    output = tmp_path / "decode.json"
    command = [sys.executable, str(RUN), "decode", *sizes, *context, "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr  # it is not where the logits differ
    results = json.loads(output.read_text())["results"]
    of_context = [result for result in results if "saved" in result]
    others = [result for result in results if result not in of_context]
    assert [result["way"] for result in others] == ["trix 8 bit", "trix 24 bit", "ort float32", "torch float32"]
    assert all(result["seconds"] > 0 and result["resident_bytes"] > 0 for result in others)
    assert "| trix 8 bit | 1 | " in finished.stdout
    ways = ["context, a route per layer", "context, one route", "context, no route"]
    assert [(result["way"], result["d_model"], result["layers"], result["tiles"]) for result in of_context] == [
        (way, 32, 2, 4) for way in ways
    ]
    assert all(result["seconds"] > 0 and result["saved"] < 1 for result in of_context)
    assert of_context[0]["saved"] == 0
    assert "| context, one route | 32 | 2 | 4 | " in finished.stdout


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        (["--repeats", "4"], r"repeats (4) must be >= 5"),
        (["--context-turns", "4"], r"context-turns (4) must be >= 5"),
        (["--context-layers", "1"], r"context-layers (1) must be >= 2, for layers to share a route"),
    ],
)
def test_a_number_that_is_too_small_is_told_in_one_line(option: list[str], rule: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "decode", *option, "--output", str(tmp_path / "decode.json")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (2, f"run.py: error: {rule}\n")
    assert list(tmp_path.iterdir()) == []
