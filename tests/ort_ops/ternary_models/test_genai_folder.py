"""A folder for onnxruntime-genai is data from a stranger: nothing in it chooses code, paths or devices."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_decoders import BITNET, RandomCheckpoint

from lightning_modules.cli import main
from ort_ops.file_format import ModelFileError
from ort_ops.library import LIBRARY_NAME
from ort_ops.ternary_models.decoder_folder import write_decoder
from ort_ops.ternary_models.genai_folder import check_folder

pytestmark = pytest.mark.usefixtures("native_library")

CONFIG = "genai_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_decoder(RandomCheckpoint(BITNET), tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.mark.parametrize("native", [True, False])
def test_what_is_written_is_safe_to_run(native: bool, tmp_path: Path) -> None:
    write_decoder(RandomCheckpoint(BITNET), tmp_path / "decoder", native=native)
    config = check_folder(tmp_path / "decoder")
    assert config["model"]["context_length"] == BITNET.max_position


def test_how_it_searches_may_be_changed(folder: Path) -> None:
    change(folder, lambda config: config["search"].update(temperature=0.5, top_k=3))
    assert check_folder(folder)["search"]["top_k"] == 3


def change(folder: Path, edit: Callable[[Any], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def options(config: Any) -> Any:
    return config["model"]["decoder"]["session_options"]


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another library": (
        lambda config: options(config).update(custom_ops_library="../evil.so"),
        rf"custom_ops_library \('\.\./evil\.so'\) must be '{LIBRARY_NAME}'",
    ),
    "a provider": (
        lambda config: options(config)["provider_options"].append({"qnn": {"backend_path": "evil.so"}}),
        r"provider_options \(\[\{'qnn': .*\) must be \[\]",
    ),
    "an option of the session": (
        lambda config: options(config).update(ep_library="evil.so"),
        r"model\.decoder\.session_options must hold .* alone, not \['ep_library'\]",
    ),
    "another file": (
        lambda config: config["model"]["decoder"].update(filename="/tmp/a.onnx"),
        r"filename \('/tmp/a\.onnx'\) must be",
    ),
    "another kind": (lambda config: config["model"].update(type="whisper"), r"model\.type \('whisper'\) must be 'llama'"),
    "another model": (lambda config: config["model"].update(vision={}), r"model must hold .* alone, not \['vision'\]"),
    "something else": (lambda config: config.update(engine={}), r"it must hold model, search alone, not \['engine'\]"),
    "another input": (
        lambda config: config["model"]["decoder"]["inputs"].update(input_ids="logits"),
        r"inputs \(\{.*'input_ids': 'logits'.* must be \{'input_ids': 'input_ids'",
    ),
    "a format that printf writes memory with": (  # onnxruntime-genai 0.18 dies of it
        lambda config: config["model"]["decoder"]["outputs"].update(present_key_names="%s%s%n"),
        r"outputs \(\{.*'present_key_names': '%s%s%n'.* must be \{",
    ),
    "no outputs": (lambda config: config["model"]["decoder"].pop("outputs"), r"outputs \(None\) must be \{"),
    "a size of 0": (
        lambda config: config["model"]["decoder"].update(head_size=0),
        r"model\.decoder\.head_size \(0\) must be an integer >= 1 and <= ",
    ),
    "a batch": (lambda config: config["search"].update(batch_size=3), r"search must hold .* alone, not \['batch_size'\]"),
    "no model": (lambda config: config.pop("model"), r"model must hold .* alone, not None"),
    "a list": (lambda config: config.update(model=[]), r"model must hold .* alone, not \[\]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_configuration_that_names_anything_else_is_refused(case: str, folder: Path) -> None:
    edit, text = CHANGES[case]
    change(folder, edit)
    with pytest.raises(ModelFileError, match=text):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model", "decoder", "session_options", "filename"])
def test_a_name_that_stands_twice_is_refused(name: str, folder: Path) -> None:
    """onnxruntime-genai reads both values: the first could name a library, and the second hide it."""
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace(f'"{name}":', f'"{name}": {{"custom_ops_library": "evil.so"}}, "{name}":', 1))
    with pytest.raises(ModelFileError, match=f"name '{name}' must stand once in an object"):
        check_folder(folder)


def test_a_library_that_is_not_the_installed_one_is_refused(folder: Path) -> None:
    with (folder / LIBRARY_NAME).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelFileError, match="must be the library of this installation, as it is code"):
        check_folder(folder)
    (folder / LIBRARY_NAME).unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        check_folder(folder)


@pytest.mark.parametrize("name", [CONFIG, "model.onnx", "model.onnx.data"])
def test_a_file_that_is_missing_or_cut_short_is_told_in_one_line(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFileError):
        check_folder(folder)
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=name):
        check_folder(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"null", b"\xff", b"{", b"3" * 5000], ids=["deep", "null", "bytes", "half", "long"]
)
def test_what_is_no_configuration_is_refused(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ModelFileError):
        check_folder(folder)


def test_generate_names_the_extra_that_is_missing_and_what_it_cannot_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert main(["generate", str(folder), "--prompt", "The "]) == 2
    assert "needs onnxruntime-genai: pip install 'trix[genai]'" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "The ", "--no-library"]) == 2
    assert "--no-library is for files of `trix export`" in capsys.readouterr().err
