"""The C++ example: a host without Python computes what Python does, and says what is wrong."""

import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from native_builds import NATIVE, run

from ort_ops.export import export_classifier
from ort_ops.library import get_library_path
from ort_ops.runtime import ExportedModel
from trix.nn import Classifier, ClassifierConfig, FFNConfig

POSITIONS, FEATURES = 5, 6


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, cxx_compiler: str) -> Path:
    program = tmp_path_factory.mktemp("host") / "host"
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", NATIVE)
    run(cxx_compiler, *flags, NATIVE / "example" / "host.cpp", "-o", program, "-ldl")
    return program


@pytest.fixture(scope="module")
def runtime() -> Path:
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*"))
    if not found:
        pytest.skip("this build of onnxruntime has no library of its own (libonnxruntime.*)")
    return found[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, native_library: None) -> Path:
    """Without fallback functions: it runs on the native operators or not at all."""
    torch.manual_seed(0)
    classifier = Classifier(FEATURES, 3, ClassifierConfig(16, 1, 2, POSITIONS, ffn=FFNConfig(num_tiles=4))).eval()
    path = tmp_path_factory.mktemp("model") / "classifier.onnx"
    export_classifier(classifier, ["a", "b", "c"], torch.randn(20, POSITIONS, FEATURES), path, fallback=False)
    return path


def call(host: Path, *arguments: str | Path, numbers: np.ndarray) -> subprocess.CompletedProcess[str]:
    text = " ".join(f"{value:.9g}" for value in numbers.flat)
    return subprocess.run([host, *map(str, arguments)], input=text, capture_output=True, text=True, timeout=60)


def test_host_computes_what_python_does(host: Path, runtime: Path, model: Path) -> None:
    x_BTF = np.random.default_rng(0).standard_normal((7, POSITIONS, FEATURES), dtype=np.float32)
    finished = call(host, runtime, get_library_path(), model, str(POSITIONS), str(FEATURES), numbers=x_BTF)
    assert finished.returncode == 0, finished.stderr
    logits = np.array([line.split() for line in finished.stdout.splitlines()], np.float32)
    np.testing.assert_array_equal(logits, ExportedModel(model, num_threads=1).run(x_BTF)[0])


def test_host_says_what_is_wrong(host: Path, runtime: Path, model: Path, tmp_path: Path) -> None:
    sizes, x = (str(POSITIONS), str(FEATURES)), np.zeros(POSITIONS * FEATURES)
    cases = {
        "usage: ": ((runtime,), x),
        "no such library": ((runtime, tmp_path / "no such library", model, *sizes), x),
        "doesn't exist": ((runtime, get_library_path(), tmp_path / "no model", *sizes), x),
        "stdin (29 numbers) must hold a multiple of 30": ((runtime, get_library_path(), model, *sizes), x[1:]),
        "0 must be a number >= 1": ((runtime, get_library_path(), model, "0", "6"), x),
    }
    for text, (arguments, numbers) in cases.items():
        finished = call(host, *arguments, numbers=numbers)
        assert finished.returncode != 0
        assert text in finished.stderr
