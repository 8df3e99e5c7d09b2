"""``trix import``: a checkpoint becomes a folder, or one line says why not; no torch is loaded."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from random_decoders import BITNET, RandomCheckpoint

from lightning_modules.cli import main
from ort_ops.library import LIBRARY_NAME
from ort_ops.ternary_models.types import TernaryMatrix

pytestmark = pytest.mark.usefixtures("native_library")


class Opened:
    """What is given for the path of a checkpoint, in place of a reader."""

    checkpoint: Any = RandomCheckpoint(BITNET)

    def __call__(self, path: Path) -> RandomCheckpoint:
        if isinstance(self.checkpoint, Exception):
            raise self.checkpoint
        return self.checkpoint


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    module: Any = ModuleType("reading")
    module.open_checkpoint = Opened()
    monkeypatch.setitem(sys.modules, "ort_ops.ternary_models.reading", module)
    return module.open_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_and_told(opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "decoder"
    assert main(["import", "checkpoint", "--output", str(output)]) == 0
    assert names(output) == sorted(["genai_config.json", LIBRARY_NAME, "model.onnx", "model.onnx.data"])
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote   {output}\nfrom    random weights\nsize    ")
    assert "of the largest output of BitLinear in numpy (8 products of the first and the last layer)\n" in out
    assert err == ""


@pytest.mark.parametrize("options", [["--head", "float16"], ["--head", "float32"], ["--no-native"]], ids=" ".join)
def test_options_say_how_it_is_kept(options: list[str], opened: Opened, tmp_path: Path) -> None:
    for folder, given in (("default", []), ("other", options)):
        assert main(["import", "checkpoint", "--output", str(tmp_path / folder), *given]) == 0
    sizes = [(tmp_path / folder / "model.onnx.data").stat().st_size for folder in ("default", "other")]
    assert sizes[0] < sizes[1]
    assert (LIBRARY_NAME in names(tmp_path / "other")) == ("--no-native" not in options)


class Broken(RandomCheckpoint):
    def ternary(self, name: str) -> TernaryMatrix:
        matrix = super().ternary(name)
        return TernaryMatrix(matrix.code_NK, np.float32(np.nan)) if name == "layers.2.down" else matrix


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        (ValueError("tensor a: b must be c"), "trix: error: tensor a: b must be c\n"),
        (
            ImportError("files in GGUF need gguf: pip install 'trix[import]'"),
            "files in GGUF need gguf: pip install 'trix[import]'",
        ),
        (FileNotFoundError(2, "No such file or directory", "config.json"), "config.json: No such file or directory"),
        (Broken(BITNET), "layers.2.down: scale must be finite, 1 of 1 are not"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    checkpoint: Any, text: str, opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened.checkpoint = checkpoint
    assert main(["import", "checkpoint", "--output", str(tmp_path / "decoder")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1
    assert names(tmp_path) == []


def test_what_is_there_is_not_replaced(opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    for output in (tmp_path, tmp_path / "mine.txt"):
        assert main(["import", "checkpoint", "--output", str(output)]) == 2
        assert f"output {output} must" in capsys.readouterr().err
    assert names(tmp_path) == ["mine.txt"]


def test_a_missing_library_is_told(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ort_ops.library.LIBRARY_NAME", "libmissing.so")
    assert main(["import", "checkpoint", "--output", str(tmp_path / "decoder")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trix: error: the native operators must be installed: `trix import --no-native` writes a folder")
    assert main(["import", "checkpoint", "--output", str(tmp_path / "decoder"), "--no-native"]) == 0


def test_commands_that_read_tiles_say_what_the_file_is(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "checkpoint", "--output", str(tmp_path / "decoder")]) == 0
    model = str(tmp_path / "decoder" / "model.onnx")
    for arguments in (
        ["inspect", model, "--output", str(tmp_path / "a.html")],
        ["surgery", model, "freeze", "--layer", "0", "--tile", "0", "--tag", "a", "--output", str(tmp_path / "b.onnx")],
        ["generate", model, "--prompt", "The "],
        ["bench", model],
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "task (decoder) must be" in capsys.readouterr().err
    assert names(tmp_path) == ["decoder"]


NO_TORCH = """
import sys
from types import ModuleType
from random_decoders import BITNET, RandomCheckpoint
from lightning_modules.cli import main
sys.modules["ort_ops.ternary_models.reading"] = reading = ModuleType("reading")
reading.open_checkpoint = lambda path: RandomCheckpoint(BITNET)
assert main(["import", "checkpoint", "--output", "decoder"]) == 0
heavy = [name for name in ("torch", "lightning", "transformers", "trix.nn") if name in sys.modules]
assert not heavy, heavy
"""


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[2] / "support"), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}\n{NO_TORCH}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
