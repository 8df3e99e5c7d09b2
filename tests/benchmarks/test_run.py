"""The benchmark runner: a case is run and recorded, also where nothing has been recorded before."""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


def test_a_case_with_a_figure_is_drawn_beside_its_record(tmp_path: Path) -> None:
    output = tmp_path / "results" / "speed.json"
    options = ["--sizes", "8x4", "--batch", "2", "--length", "5", "--repeats", "2", "--output", str(output)]
    subprocess.run([sys.executable, str(RUN), "ffn_speed", *options], check=True, capture_output=True)
    record = json.loads(output.read_text())
    assert record["options"].items() >= {"batch": 2, "length": 5, "repeats": 2}.items()
    assert {"git", "cpu", "torch", "onnxruntime"} <= record["machine"].keys()
    results = {result["layer"]: result for result in record["results"]}
    assert results.keys() == {"dense", "loop", "v1", "v2", "trix", "mixture", "product", "routing"}
    assert all(len(result["train_ms"]) == 2 for result in results.values())
    assert results["v2"]["saved_bytes"] < results["loop"]["saved_bytes"]
    assert output.with_suffix(".svg").read_text().startswith("<?xml")


def test_what_the_harness_costs_is_measured_on_equal_work(tmp_path: Path) -> None:
    output = tmp_path / "overhead.json"
    options = ["--intervals", "1", "--interval", "2", "--segment", "1", "--only", "trainer", "trix fit"]
    command = [sys.executable, str(RUN), "harness_overhead", *options, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # it is not where the weights at the end differ
    results = json.loads(output.read_text())["results"]
    assert [result["way"] for result in results] == ["bare", "trainer", "trix fit"]
    assert all(len(result[key]) == 1 and min(result[key]) > 0 for result in results for key in ("cpu_s", "wall_s"))
    assert "trix fit / bare: " in result.stdout
