"""``trix inspect``, ``surgery`` and ``bench`` on exported files: without torch, and one line for a mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import exported_models
import numpy as np
import onnx
import pytest

from lightning_modules.cli import main
from lightning_modules.commands import bench
from ort_ops.signature_layers import read_model
from trix.nn import FFNConfig

pytestmark = pytest.mark.usefixtures("native_library")
WHERE = ["--layer", "1", "--tile", "2", "--tag", "<tag>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.export(tmp_path_factory.mktemp("exported"), FFNConfig(num_tiles=4), num_layers=2).path


def test_a_file_is_edited_and_its_page_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sub" / "new.onnx"
    assert main(["surgery", str(model), "insert", *WHERE, "--signature", "+0-" * 6 + "-+", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "after   7 +, 7 -, 6 zeros, frozen" in out
    assert f"wrote   {output}  (run and read again: the edit stands" in out
    assert read_model(output)[3][1].history[0]["tag"] == "<tag>"
    assert main(["inspect", str(output)]) == 0
    page = output.with_suffix(".html").read_text()
    for text in (
        "language model",
        "Layer 1",
        "&lt;tag&gt;",
        "insert",
        "onnx",
        "frozen",
        "SignatureRoute",
        "routed the same",
        "<dt>configuration</dt>",
        "<th>usage</th>",
    ):
        assert text in page
    assert page.count('class="strip"') == 8
    assert "<tag>" not in page


def test_layers_that_share_one_route_are_edited_and_shown_each_on_its_own(tmp_path: Path) -> None:
    shared = exported_models.export(tmp_path, FFNConfig(num_tiles=4, route_on="context"), num_layers=2).path
    first, output = tmp_path / "first.onnx", tmp_path / "new.onnx"
    for layer, source, target in ((0, shared, first), (1, first, output)):
        edit = ["--layer", str(layer), "--tile", "2", "--signature", "+0-" * 6 + "-+", "--tag", f"of layer {layer}"]
        assert main(["surgery", str(source), "insert", *edit, "--output", str(target)]) == 0
    assert main(["inspect", str(output)]) == 0
    page = output.with_suffix(".html").read_text()
    for text in ("Layer 0", "Layer 1", "of layer 0", "of layer 1", "<th>usage</th>"):
        assert text in page
    assert page.count('class="strip"') == 8
    before, after = (read_model(path)[2] for path in (shared, output))
    for layer, edited in zip(before, after, strict=True):
        assert (layer.signature_ED != edited.signature_ED).any(axis=1).tolist() == [False, False, True, False]


def test_a_signature_can_come_from_a_file(model: Path, tmp_path: Path) -> None:
    signs, listed = tmp_path / "signs.onnx", tmp_path / "listed.onnx"
    (tmp_path / "s.json").write_text(json.dumps({"positive_dims": [3], "negative_dims": [0, 1]}))
    given = ((signs, "--0+" + "0" * 16), (listed, str(tmp_path / "s.json")))
    for output, signature in given:
        assert main(["surgery", str(model), "insert", *WHERE, "--signature", signature, "--output", str(output)]) == 0
    assert (read_model(signs)[2][1].signature_ED == read_model(listed)[2][1].signature_ED).all()


def test_speed_is_measured_printed_drawn_and_recorded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MIN_SAMPLE_SECONDS", 0.0)
    output = tmp_path / "speed.json"
    options = ["--lengths", "1", "8", "256", "--threads", "1", "--rounds", "5", "--output", str(output)]
    assert main(["bench", str(model), *options]) == 0
    results = json.loads(output.read_text())["results"]
    found = [(result["kernels"], result["threads"], result["mode"], result["length"]) for result in results]
    half = exported_models.CONTEXT // 2
    cases = [("whole", 1), ("whole", 8), ("whole", exported_models.CONTEXT), ("generation", half)]
    assert found == [(kernels, 1, *case) for kernels in ("native", "portable") for case in cases]
    for result in results:
        assert result["min_ms"] <= result["median_ms"] <= result["max_ms"]
        assert result["tokens_per_s"] == pytest.approx(1e3 / result["ms_per_token"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^(native|portable) +1 ", out, re.MULTILINE)) == 8
    assert out.count(f" {half} one by one ") == 2
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")


def test_cases_are_listed_and_run_where_the_source_tree_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 0
    assert "  kernels\n" in capfd.readouterr().out
    assert main(["bench", "kernels", "--help"]) == 0
    assert "--threads" in capfd.readouterr().out
    assert main(["bench", "kernel"]) == 2
    assert "case (kernel) must be a file that ends with .onnx, or one of adaptive_k, " in capfd.readouterr().err
    monkeypatch.setattr(bench, "RUNNER", tmp_path / "benchmarks" / "run.py")
    for arguments in ([], ["kernels"]):
        assert main(["bench", *arguments]) == 2
        assert "come with the source tree, not with the installed package" in capfd.readouterr().err


MISTAKES = [
    (["inspect", "{missing}"], "missing.onnx: No such file"),
    (["inspect", "{text}"], "text.onnx: not an ONNX file, or a damaged one"),
    (["inspect", "{model}", "--num-tokens", "5"], "--num-tokens belongs to a checkpoint"),
    (["surgery", "{model}", "freeze", *WHERE, "--output", "{model}"], "must be another file than"),
    (["surgery", "{model}", "freeze", *WHERE, "--output", "{text}"], "must not exist yet: no file is replaced"),
    (["surgery", "{model}", "freeze", *WHERE, "--output", "{out}.ckpt"], "new.onnx.ckpt must end with .onnx: so do exported"),
    (["inspect", "{model}", "--output", "{text}"], "text.onnx must not exist yet: no .onnx file is replaced"),
    (["generate", "{folder}", "--prompt", "x"], ": a folder without genai_config.json, not one of `trix import`"),
    (["surgery", "{text}", "freeze", *WHERE, "--output", "{out}"], "text.onnx: not an ONNX file, or a damaged one"),
    (
        ["surgery", "{model}", "insert", *WHERE, "--signature", "+-", "--output", "{out}"],
        "signature (2,) must have shape (20,)",
    ),
    (["surgery", "{model}", "unfreeze", *WHERE, "--output", "{out}"], "nothing to unfreeze: tile (2) of layer (1) is not"),
    (
        ["surgery", "{empty}", "freeze", *WHERE, "--output", "{out}"],
        "file format (None) must be 3: was it written by `trix export`?",
    ),
    (["bench", "{missing}"], "missing.onnx: no such file"),
    (["bench", "{model}", "--rounds", "4"], "--rounds (4) must be >= 5"),
    (["bench", "{model}", "--lengths", "0"], "--lengths (0) must be >= 1"),
    (["bench", "{model}", "--threads", "0"], "num_threads (0) must be >= 1"),
    (["bench", "{model}", "--output", "{out}"], "new.onnx) must end with .json"),
    (["bench", "--rounds", "5"], "the following arguments are required: MODEL"),
    (["completion", "fish"], "argument shell: invalid choice: 'fish'"),
]


@pytest.mark.parametrize("arguments", [["bench"], ["generate", "--prompt", "a"]], ids=["bench", "generate"])
def test_a_model_that_answers_with_nan_is_told_in_a_line_of_its_own(
    arguments: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load_model(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = np.full(tuple(tensor.dims), np.nan, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save_model(proto, tmp_path / "nan.onnx")
    assert main([arguments[0], str(tmp_path / "nan.onnx"), *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert out in ("", "a\n")  # of generate the prompt
    assert re.fullmatch(r"trix: error: .*nan.onnx: logits must be numbers, \d+ of \d+ are NaN\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.onnx"]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line_and_no_file(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    places = {name: tmp_path / f"{name}.onnx" for name in ("missing", "text", "empty")}
    places |= {"model": model, "folder": tmp_path, "out": tmp_path / "a" / "new.onnx"}
    places["empty"].touch()
    before = set(model.parent.iterdir())
    assert main([text.format(**places) for text in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"text.onnx", "empty.onnx"}
    assert set(model.parent.iterdir()) == before


def test_no_command_on_a_file_loads_torch(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        f"model, out = {str(model)!r}, {str(tmp_path)!r}\n"
        "where = ['--layer', '0', '--tile', '0', '--tag', 't', '--output']\n"
        "assert main(['inspect', model, '--output', out + '/page.html']) == 0\n"
        "assert main(['surgery', model, 'remove', *where, out + '/new.onnx']) == 0\n"
        "assert main(['surgery', model, 'insert', '--signature', '+' * 20, *where, out + '/other.onnx']) == 0\n"
        "assert main(['bench', model, '--threads', '1', '--lengths', '1', '--output', out + '/speed.json']) == 0\n"
        "for command in ('bench', 'completion', 'inspect', 'surgery', 'export', 'generate', 'doctor', 'runs', 'why'):\n"
        "    assert main([command, '--help']) == 0\n"
        "heavy = [name for name in ('torch', 'lightning', 'sklearn') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("examples:") == 9
