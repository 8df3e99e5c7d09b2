"""Weights in a second file: written whole, read from anywhere, edited as a pair, and followed nowhere else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import exported_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto
from torch import nn

from lightning_modules.cli import main
from ort_ops.export import ExportError, export, export_language_model
from ort_ops.external_data import check_external_data
from ort_ops.file_format import ModelFileError
from ort_ops.library import session_options
from ort_ops.runtime import ExportedModel, open_model
from ort_ops.signature_layers import read_model
from ort_ops.state import empty_state
from ort_ops.surgery import Edit, VerificationError, operate_on_file
from trix.nn import FFNConfig, TriXFFN

pytestmark = pytest.mark.usefixtures("native_library")
WIDTH = 48
TOKEN = np.arange(8).reshape(1, 8)


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), TriXFFN(WIDTH, num_tiles=6), nn.Linear(WIDTH, 3))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose weights of more than 64 bytes are in model.onnx.data, and in single.onnx the same in one file."""
    folder = tmp_path_factory.mktemp("pair")
    model = exported_models.make_model(FFNConfig(num_tiles=6))
    held_out = torch.randint(0, 11, (60,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ort_ops.external_weights.INLINE_BYTES", 64)
        report = export_language_model(model, exported_models.VOCABULARY, held_out, folder / "model.onnx", external_data=True)
    assert f"data    {report.data_bytes / 1e6:.2f} MB of it in model.onnx.data" in str(report)
    onnx.save_model(onnx.load(folder / "model.onnx"), folder / "single.onnx")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in a folder that is not the working folder."""
    shutil.copytree(original, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return Path("models")


def logits(path: Path) -> np.ndarray:
    return open_model(path).run(TOKEN)[0]


def test_the_pair_answers_as_one_file_and_both_are_counted(folder: Path) -> None:
    model = open_model(folder / "model.onnx")
    assert np.array_equal(model.run(TOKEN)[0], logits(folder / "single.onnx"))
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert min(sizes) > 0
    assert model.file_bytes == sum(sizes)
    assert model.check_parity().num_unexplained == 0
    assert ExportedModel(folder / "model.onnx", use_library=False).check_parity().max_relative_difference < 1e-5
    plain = ort.InferenceSession(folder / "model.onnx", session_options())
    assert np.array_equal(plain.run(["logits"], {"token": TOKEN, **empty_state(plain, 1)})[0], model.run(TOKEN)[0])


def test_every_command_reads_it_from_another_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model.onnx")
    assert main(["inspect", model]) == 0
    num_mb = (folder / "model.onnx.data").stat().st_size / 1e6
    assert f"model.onnx.data {num_mb:.2f} MB" in (folder / "model.html").read_text()
    assert main(["generate", model, "--prompt", "abc", "--num-tokens", "3"]) == 0
    assert main(["bench", model, "--threads", "1", "--lengths", "4", "--rounds", "5"]) == 0
    where = ["--layer", "1", "--tile", "5", "--tag", "off", "--output"]
    assert main(["surgery", model, "remove", *where, "elsewhere/edited.onnx"]) == 0
    assert "wrote   elsewhere/edited.onnx" in capsys.readouterr().out
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["edited.onnx", "edited.onnx.data"]
    single = ["surgery", str(folder / "single.onnx"), "remove", *where, "single.onnx"]
    assert main(single) == 0
    assert np.array_equal(logits(Path("elsewhere/edited.onnx")), logits(Path("single.onnx")))
    assert read_model(Path("elsewhere/edited.onnx"))[2][1].is_free_E.tolist() == [False] * 5 + [True]


def test_an_edit_leaves_its_source_alone_and_needs_no_file_of_it(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    operate_on_file(folder / "model.onnx", folder / "edited.onnx", Edit("freeze", 0, 1, "held"))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    for name in before:
        (folder / name).unlink()
    assert open_model(folder / "edited.onnx").check_parity().max_relative_difference < 1e-5
    assert set(check_external_data(folder / "edited.onnx").file_bytes) == {"edited.onnx.data"}


def test_an_edit_takes_no_data_from_another_model(folder: Path) -> None:
    (folder / "edited.onnx.data").write_bytes(b"of another model")
    with pytest.raises(ValueError, match=r"edited\.onnx\.data must not exist yet"):
        operate_on_file(folder / "model.onnx", folder / "edited.onnx", Edit("freeze", 0, 1, "held"))
    assert (folder / "edited.onnx.data").read_bytes() == b"of another model"
    assert not (folder / "edited.onnx").exists()


def test_an_edit_that_does_not_verify_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())

    def spoiled(*_: object) -> None:
        raise VerificationError("verification failed")

    monkeypatch.setattr("ort_ops.surgery._check_answer", spoiled)
    with pytest.raises(VerificationError):
        operate_on_file(folder / "model.onnx", folder / "edited.onnx", Edit("freeze", 0, 1, "held"))
    assert sorted(folder.iterdir()) == before


def test_what_one_file_cannot_hold_goes_to_a_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, path = make_module(), torch.randn(4, WIDTH), tmp_path / "m.onnx"
    assert export(module, x, path).data_file is None
    single = open_model(path).run_outputs({"input": x.numpy()})["output_0"]
    monkeypatch.setattr("ort_ops.written_file.SINGLE_FILE_BYTES", 10_000)
    report = export(module, x, path)
    assert report.data_file == "m.onnx.data"
    assert report.file_bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    np.testing.assert_array_equal(open_model(path).run_outputs({"input": x.numpy()})["output_0"], single)
    offsets = [tensor.offset for tensor in check_external_data(path).tensors]
    assert all(offset % 4096 == 0 for offset in offsets)


def test_an_export_that_fails_leaves_the_old_pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("ort_ops.verification.MAX_RELATIVE_DIFFERENCE", 0.0)
        patch.setattr("ort_ops.own_module.MAX_RELATIVE_DIFFERENCE", 0.0)
        with pytest.raises(ExportError, match="max relative difference"):
            export(make_module(), torch.randn(4, WIDTH), folder / "model.onnx", external_data=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def external(proto: ModelProto) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def entry(key: str, value: str) -> Callable[[ModelProto], None]:
    def edit(proto: ModelProto) -> None:
        next(part for part in external(proto).external_data if part.key == key).value = value

    return edit


def another_entry(key: str, value: str) -> Callable[[ModelProto], None]:
    return lambda proto: external(proto).external_data.add(key=key, value=value)


def in_a_function(proto: ModelProto) -> None:
    node = proto.functions[0].node.add(op_type="Constant", output=["unused"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external(proto))
    node.attribute[0].t.external_data[0].value = "/etc/passwd"


def in_an_inner_graph(proto: ModelProto) -> None:
    node = proto.graph.node.add(op_type="If", output=["unused"])
    inner = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    inner.initializer.add().CopyFrom(external(proto))
    inner.initializer[0].external_data[0].value = "../model.onnx.data"


def many_times(proto: ModelProto) -> None:
    tensor = max(proto.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    for place in range(400):
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = f"again{place}"


def a_larger_shape(proto: ModelProto) -> None:
    external(proto).dims[0] = 2**40


LOCATION = r"location of external data \(.*\) must be the name of a file in the model's folder"
HOSTILE: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "an absolute path": (entry("location", "/etc/passwd"), LOCATION),
    "a device": (entry("location", "/dev/zero"), LOCATION),
    "the folder above": (entry("location", "../model.onnx.data"), LOCATION),
    "two dots": (entry("location", ".."), LOCATION),
    "a subfolder": (entry("location", "sub/model.onnx.data"), LOCATION),
    "another system's path": (entry("location", "..\\model.onnx.data"), LOCATION),
    "nothing": (entry("location", ""), LOCATION),
    "two lines": (entry("location", "model.onnx\n.data"), LOCATION),
    "a NUL": (entry("location", "model.onnx.data\0"), LOCATION),
    "an address in memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), LOCATION),
    "a missing file": (entry("location", "none.data"), "external data none.data must lie next to the model: No such file"),
    "a link to elsewhere": (entry("location", "link.data"), "external data link.data must lie in the model's folder"),
    "a pipe": (entry("location", "pipe.data"), "external data pipe.data must be a regular file"),
    "a folder": (entry("location", "folder.data"), "external data folder.data must be a regular file"),
    "an offset beyond the file": (
        entry("offset", f"{10**12}"),
        r"external data model.onnx.data: offset \(1000000000000\) \+ length \(\d+\) .* must be <= its size",
    ),
    "an offset below 0": (entry("offset", "-1"), r"offset \('-1'\) of tensor .* must be a whole number"),
    "an offset of 400 digits": (entry("offset", "9" * 400), "offset .* must be a whole number"),
    "another length": (entry("length", "7"), r"length \('7'\) of tensor .* must be that of its shape"),
    "a length of text": (entry("length", "many"), r"length \('many'\) of tensor .* must be a whole number"),
    "a key twice": (
        another_entry("location", "model.onnx.data"),
        r"key of external data \('location'\) must be one of .*, each once",
    ),
    "an unknown key": (another_entry("basepath", "/"), r"key of external data \('basepath'\) must be one of"),
    "a larger shape": (a_larger_shape, r"length \('80'\) of tensor .* must be that of its shape"),
    "one range many times": (many_times, r"external data model.onnx.data: lengths together \(\d+\) must be <= its size"),
    "a constant of a function": (in_a_function, LOCATION),
    "a constant of an inner graph": (in_an_inner_graph, LOCATION),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_says_of_its_data_is_checked_before_it_is_followed(name: str, folder: Path) -> None:
    edit, problem = HOSTILE[name]
    (folder / "link.data").symlink_to("../outside.data")
    Path("outside.data").write_bytes((folder / "model.onnx.data").read_bytes())
    os.mkfifo(folder / "pipe.data")
    (folder / "folder.data").mkdir()
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(proto)
    (folder / "bad.onnx").write_bytes(proto.SerializeToString())
    for read in (ExportedModel, read_model):
        with pytest.raises(ModelFileError, match=rf"^models/bad\.onnx: {problem}"):
            read(folder / "bad.onnx")


def test_data_that_was_cut_short_is_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(ModelFileError, match=r"external data model\.onnx\.data: offset .* must be <= its size"):
        open_model(folder / "model.onnx")


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder / "moved")
    (folder / "model.onnx.data").symlink_to("moved")
    assert np.array_equal(logits(folder / "model.onnx"), logits(folder / "single.onnx"))
