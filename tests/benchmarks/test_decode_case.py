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
    output = tmp_path / "decode.json"
    command = [sys.executable, str(RUN), "decode", *sizes, "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr  # it is not where the logits differ
    results = json.loads(output.read_text())["results"]
    assert [result["way"] for result in results] == ["trix 8 bit", "trix 24 bit", "ort float32", "torch float32"]
    assert all(result["seconds"] > 0 and result["resident_bytes"] > 0 for result in results)
    assert "| trix 8 bit | 1 | " in finished.stdout
