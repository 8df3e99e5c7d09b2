"""Exported models made to do harm: each command says one line, ends with 2, and leaves every file as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hostile_runs import assert_refused, commands_on_model
from onnx import ModelProto

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def properties(change: Callable[[dict[str, Any]], object]) -> Callable[[ModelProto], None]:
    """Metadata changed as values."""

    def edit(proto: ModelProto) -> None:
        values = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
        change(values)
        onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in values.items()})

    return edit


def written(key: str, text: str) -> Callable[[ModelProto], None]:
    """A metadata property as text."""

    def edit(proto: ModelProto) -> None:
        next(entry for entry in proto.metadata_props if entry.key == f"trix.{key}").value = text

    return edit


def reference(**values: Any) -> Callable[[ModelProto], None]:
    return properties(lambda metadata: metadata["trix.reference"].update(values))


def layer(**values: Any) -> Callable[[ModelProto], None]:
    return properties(lambda metadata: metadata["trix.layers"][0].update(values))


ENTRY = {"operation": "insert", "tile_idx": 0, "step": 0, "tag": ""}
# What all commands refuse, and what those do that read the metadata of layers; the others do without.
METADATA: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "no JSON": (written("config", "{no"), "metadata config must be JSON"),
    "lists in lists": (written("config", "[" * 200_000), "nested too deeply"),
    "thousands of digits": (written("context_length", "9" * 10_000), "metadata context_length must be JSON: .*limit"),
    "4 million values": (
        written("config", "[" + "[]," * 4_000_000 + "[]]"),
        r"number of values of the metadata \(\d+\) must be",
    ),
    "a context of 2**60": (written("context_length", f"{2**60}"), r"context_length \(\S+\) must be >= 1 and <= 1048576"),
    "a context of 400 digits": (written("context_length", f"{10**400}"), r"context_length \(\S+\) must be >= 1 and <="),
    "a context of NaN": (written("context_length", "NaN"), r"metadata context_length \(nan\) must be of type int"),
    "a size of 400 digits": (written("float32_bytes", f"{10**400}"), r"float32_bytes \(\S+\) must be >= 1 and <="),
    "a size below 0": (written("float32_bytes", "-1"), r"float32_bytes \(-1\) must be >= 1"),
    "a format of 2**60": (written("format", f"{2**60}"), r"file format \(1152921504606846976\) must be 3"),
    "a graph cut short": (lambda proto: proto.graph.node.pop(), "onnxruntime can"),
}
OF_GENERATION: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "a character twice": (
        properties(lambda m: m.update({"trix.vocabulary": "a" * len(m["trix.vocabulary"])})),
        "vocabulary .* must be distinct characters of Unicode",
    ),
    "half a surrogate": (
        properties(lambda m: m.update({"trix.vocabulary": "\ud800" + m["trix.vocabulary"][1:]})),
        "vocabulary .* must be distinct characters of Unicode",
    ),
}
OF_LAYERS: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "a record of text": (properties(lambda m: m.update({"trix.layers": ["a", "b"]})), "metadata of a layer"),
    "a record too many": (properties(lambda m: m["trix.layers"].append({})), "must be a list of 2 layers"),
    "another kind of kind": (layer(kind=5), "metadata of a layer .* must hold"),
    "a step of text": (layer(history=[ENTRY | {"step": "0"}]), "metadata of a layer .* must hold"),
    "a tag of numbers": (layer(history=[ENTRY | {"tag": 5}]), "metadata of a layer .* must hold"),
    "claims of text": (layer(claims=[["a"]] * 4), "metadata of a layer .* must hold"),
    "claims of fewer tiles": (layer(claims=[[1]]), r"claims in the metadata of a layer \(1\) must be as many as tiles \(4\)"),
    "frozen tiles beyond": (layer(frozen=[2**60]), r"frozen tiles .* must be >= 0 and < tiles \(4\)"),
    "a width of 2**34": (
        properties(lambda m: m["trix.config"].update(d_model=2**34)),
        r"config.d_model \(17179869184\) must be",
    ),
    "a width below 1": (properties(lambda m: m["trix.config"].update(d_model=-1)), r"config.d_model \(-1\) must be"),
}
OF_REFERENCE: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "a shape below 0": (
        reference(logits={"shape": [-1], "float32_base64": "AAAAAA=="}),
        "the reference example can't be checked",
    ),
    "a shape of 2**60": (
        reference(logits={"shape": [2**60], "float32_base64": "AAAAAA=="}),
        "must be 4 bytes for each element",
    ),
    "a cut array": (reference(gap={"shape": [1], "float32_base64": "AAAA"}), "must be 4 bytes for each element"),
    "no base64": (reference(logits={"shape": [1], "float32_base64": "%%%%"}), "the reference example can't be checked"),
    "no input": (reference(input=None), "reference"),
    "an input of 10**400": (reference(input=[[10**400]]), "reference"),
}


def change_model(originals: dict[str, bytes], edit: Callable[[ModelProto], object]) -> None:
    proto = onnx.load_model_from_string(originals["lm.onnx"])
    edit(proto)
    Path("bad.onnx").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", METADATA)
def test_metadata(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit, problem = METADATA[name]
    change_model(originals, edit)
    commands = commands_on_model("bad.onnx")
    for arguments in commands[:3] if "context" in name or "size" in name else commands:  # surgery needs neither
        assert_refused(arguments, problem, folder, capfd)


@pytest.mark.parametrize("name", OF_GENERATION)
def test_vocabularies(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit, problem = OF_GENERATION[name]
    change_model(originals, edit)
    assert_refused(commands_on_model("bad.onnx")[1], problem, folder, capfd)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_records_of_layers(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit, problem = OF_LAYERS[name]
    change_model(originals, edit)
    for arguments in (commands_on_model("bad.onnx")[0], commands_on_model("bad.onnx")[3]):
        assert_refused(arguments, problem, folder, capfd)


@pytest.mark.parametrize("name", OF_REFERENCE)
def test_reference_examples(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit, problem = OF_REFERENCE[name]
    change_model(originals, edit)
    assert_refused(commands_on_model("bad.onnx")[0], problem, folder, capfd)


def test_tiles_of_the_reference_that_are_none(
    originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def edit(metadata: dict[str, Any]) -> None:
        metadata["trix.reference"]["tile_idx"][0][0][0] = [2**40]

    change_model(originals, properties(edit))
    problem = r"tile_idx of the reference \(1099511627776\) must be >= 0 and < num_tiles \(4\)"
    assert_refused(commands_on_model("bad.onnx")[0], problem, folder, capfd)


@pytest.mark.parametrize("place", ["../../../../etc/passwd", "/etc/passwd", "/dev/zero", "../secret.bin"])
def test_data_outside_the_file(
    place: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def edit(proto: ModelProto) -> None:
        tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        onnx.external_data_helper.set_external_data(tensor, place)
        tensor.ClearField("raw_data")

    change_model(originals, edit)
    for arguments in commands_on_model("bad.onnx"):
        assert_refused(arguments, "", folder, capfd)


def test_names_that_are_no_text(originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto = onnx.load_model_from_string(originals["lm.onnx"])
    name = proto.functions[0].name.encode()
    Path("bad.onnx").write_bytes(originals["lm.onnx"].replace(name, b"\xff" + name[1:]))
    commands = commands_on_model("bad.onnx")
    for arguments in (commands[0], commands[3]):
        assert_refused(arguments, r"bad.onnx: name in the graph \(b'.xff", folder, capfd)


def test_shapes_of_caches(originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def edit(proto: ModelProto) -> None:
        for value in proto.graph.input:
            if value.name.startswith("past_"):
                value.type.tensor_type.shape.dim[1].dim_value = 2**60

    change_model(originals, edit)
    for arguments in commands_on_model("bad.onnx")[1:3]:
        assert_refused(arguments, "", folder, capfd)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_models_cut_short(share: float, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(originals["lm.onnx"][: int(len(originals["lm.onnx"]) * share)])
    for arguments in commands_on_model("bad.onnx"):
        assert_refused(arguments, "bad.onnx: ", folder, capfd)
