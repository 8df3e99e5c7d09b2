"""The benchmark of ternary decoders: all contenders are one decoder, and the table says where ours is behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bitnet_shape
import ggml_contestant
from cases import bitnet_decode

from lightning_modules.errors import UserError
from ort_ops.ternary_models.tensor_shapes import num_parameters

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"
OWN = [f"trix, {isa}" for isa in bitnet_decode.own_instruction_sets()]


@pytest.mark.usefixtures("native_library")
def test_all_contenders_but_ggml_answer_alike_and_are_measured(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--whole-layers", "1", "--shrink", "5", "--past", "3", "--tokens", "1", "2", "--threads", "1"]
    output = tmp_path / "bitnet_decode.json"
    command = [sys.executable, str(RUN), "bitnet_decode", *sizes, "--repeats", "5", "--no-ggml", "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr  # it is not where the logits differ
    rows = json.loads(output.read_text())["results"]["rows"]
    contenders = [*OWN, "ort 2 bit", "ort 2 bit, LUT"]
    expected = [(tokens, head, way) for tokens, head in ((1, None), (2, None), (1, "int8")) for way in contenders]
    assert [(row["tokens"], row["head"], row["contender"]) for row in rows] == expected
    assert all(row["cpu_s"] > 0 and row["wall_s"] > 0 for row in rows)
    assert "bitnet.cpp I2_S: not run" in finished.stdout
    assert "TRIX_ORT_ISA" not in os.environ


def test_a_decoder_of_other_weights_is_told_apart() -> None:
    class Fixed:
        def __init__(self, logits: list[float]) -> None:
            self._logits = np.array([logits], np.float32)

        def prepare(self, token_T: np.ndarray, num_past: int) -> None: ...
        def run(self) -> None: ...
        def logits(self) -> np.ndarray:
            return self._logits

    bitnet_decode.check({"trix, a": Fixed([1.0, 2.0]), "trix, b": Fixed([1.0, 2.0]), "ggml": Fixed([1.05, 2.0])})
    for other in ({"trix, b": Fixed([1.0, 2.0001])}, {"ggml": Fixed([2.0, 1.0])}):
        with pytest.raises(AssertionError):
            bitnet_decode.check({"trix, a": Fixed([1.0, 2.0])} | other)


def test_the_table_names_ratios_goals_and_shares_of_the_limits() -> None:
    case = {"layers": 2, "head": None, "threads": 1, "past": 64, "tokens": 1}
    times = {"trix, avx512_vnni": [(1.0, 9.0)] * 5, "trix, avx2": [(3.0, 9.0)] * 5, "ggml TQ2_0, avx2": [(2.0, 9.0)] * 5}
    rows = bitnet_decode.summarise(case, times) + bitnet_decode.summarise(case | {"threads": 2}, times)
    measured = {"int8_products_per_s": 400.0, "avx2_products_per_s": 100.0, "bytes_read_per_s": 50.0}
    table = bitnet_decode.table({"limits": measured, "layer_weights": 100, "rows": rows})
    assert "| ggml TQ2_0, avx2 | 1000.000 | 0.50 | 1.50 (goal 0.9) |  |  |" in table
    assert "| trix, avx512_vnni | 500.000 | 1.00 | 3.00 | 100% | 50% |" in table
    assert "| trix, avx2 | 1500.000 | 0.33 | 1.00 | 33% | 67% |" in table
    assert "| 2 | 2 | 64 | 1 | ggml TQ2_0, avx2 | 4500.000 | 1.00 | 1.00 |  |  |" in table  # the wall's, no goal


def test_a_missing_tool_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^llama-cpp-python==0.3.36 can't be compiled: no-such-cmake is not installed$"):
        ggml_contestant._call(["no-such-cmake"], "compiled")
    with pytest.raises(UserError, match=r"^llama-cpp-python==0.3.36 can't be downloaded: it is gone$"):
        ggml_contestant._call([sys.executable, "-c", "import sys; sys.exit('it is gone')"], "downloaded")


def test_the_shape_is_that_of_2b4t() -> None:
    config = bitnet_shape.shape(30, 128256, 4096)
    assert (config.hidden_size, config.intermediate_size, num_parameters(config)) == (2560, 6912, 2412820480)
