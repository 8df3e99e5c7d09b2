"""The benchmark runner: a case is run and recorded, also where nothing has been recorded before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


@pytest.mark.usefixtures("native_library")
def test_a_case_is_recorded_with_its_options_and_machine(tmp_path: Path) -> None:
    output = tmp_path / "results" / "packed.json"
    options = ["--sizes", "64", "--tokens", "1", "3", "--repeats", "2", "--output", str(output)]
    subprocess.run([sys.executable, str(RUN), "packed_matmul", *options], check=True, capture_output=True)
    record = json.loads(output.read_text())
    assert record["options"] == {"sizes": [64], "tokens": [1, 3], "repeats": 2}
    assert {"commit", "cpu", "torch", "onnxruntime"} <= record["machine"].keys()
    assert [(result["size"], result["tokens"]) for result in record["results"]] == [(64, 1), (64, 3)]
    assert [path.name for path in output.parent.iterdir()] == ["packed.json"]
