"""The self-test of the operators: it passes here, and says what is wrong where something is."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ort_ops import self_test
from ort_ops.library import LibraryNotFoundError, get_library_path
from ort_ops.operators import signature_route, sparse_lookup, ternary_ffn, ternary_tile_matmul
from ort_ops.panels import to_panels


def test_the_portable_operators_agree_with_numpy() -> None:
    assert self_test.check("portable") == "ok: standard ONNX operators"


def test_the_kernels_agree_with_numpy(native_library: None) -> None:
    assert self_test.check("native") == f"ok: {get_library_path()}"


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ternary_tile_matmul, signature_route, ternary_ffn, sparse_lookup):
        monkeypatch.setattr(module, "to_panels", lambda ternary: to_panels(-ternary))
    found = self_test.check("portable")
    assert found.startswith("wrong: relative error of TernaryTileMatMul (")
    assert "relative error of TernaryFFN (" in found
    for op in ("SignatureRoute", "SparseLookup"):
        assert f"relative error of {op} (inf) must be <= 1e-05" in found


def test_an_error_just_above_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_test._run
    monkeypatch.setattr(self_test, "_run", lambda *arguments: [output * np.float32(1.0001) for output in right(*arguments)[:1]])
    assert ternary_tile_matmul.OPERATOR.check(self_test._portable) > self_test.MAX_ERROR


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_output_of_the_routing_is_looked_at_under_each_gate(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_test._run

    def wrong(*arguments: Any) -> list[Any]:
        outputs = list(right(*arguments))
        outputs[place] = outputs[place][::-1]
        return outputs

    monkeypatch.setattr(self_test, "_run", wrong)
    for gate in signature_route.GATES:
        assert signature_route.check_gate(self_test._portable, gate) > self_test.MAX_ERROR


def test_the_tokens_of_adaptive_k_use_one_tile_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    right, weights = self_test._run, []

    def keep(*arguments: Any) -> Any:
        weights.append((outputs := right(*arguments))[1])
        return outputs

    monkeypatch.setattr(self_test, "_run", keep)
    signature_route.check_gate(self_test._portable, signature_route.ADAPTIVE)
    assert set((weights[0] != 0).sum(1)) == {1, 2}


def test_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_test._run
    monkeypatch.setattr(self_test, "_run", lambda *arguments: [output * np.nan for output in right(*arguments)])
    assert "relative error of TernaryTileMatMul (nan)" in self_test.check("portable")


def test_a_missing_library_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise LibraryNotFoundError("none found")

    monkeypatch.setattr(self_test, "session_options", fail)
    assert self_test.check("native") == "missing: none found"
    assert self_test.check("portable").startswith("ok: ")


def test_as_a_program_it_is_light_and_names_the_instruction_set(native_library: None) -> None:
    code = (
        "import sys; from ort_ops.self_test import main; main()\n"
        "print([name for name in ('torch', 'trix', 'lightning', 'onnxscript') if name in sys.modules])"
    )
    environment = os.environ | {"TRIX_ORT_ISA": "scalar"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    native, portable, heavy = result.stdout.splitlines()
    assert (native, portable, heavy) == (f"native ok: {get_library_path()}", "portable ok: standard ONNX operators", "[]")
    assert f"{self_test.ISA_MESSAGE}scalar" in result.stderr
