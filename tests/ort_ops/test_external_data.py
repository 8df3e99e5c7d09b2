"""Weights in a second file: written whole, read from anywhere, edited as a pair, and followed nowhere else."""

import fcntl
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
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
from ort_ops.external_data import check_external_data, remove_old_data
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


def data_of(folder: Path, model: str = "model.onnx") -> Path:
    """The only data file of a model, which is named by its content."""
    (path,) = folder.glob(f"{model}.*.data")
    assert path.name == f"{model}.{sha256(path.read_bytes()).hexdigest()[:12]}.data"
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose weights of more than 64 bytes are in a data file, and in single.onnx the same in one file."""
    folder = tmp_path_factory.mktemp("pair")
    model = exported_models.make_model(FFNConfig(num_tiles=6))
    held_out = torch.randint(0, 11, (60,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ort_ops.external_weights.INLINE_BYTES", 64)
        report = export_language_model(model, exported_models.VOCABULARY, held_out, folder / "model.onnx", external_data=True)
    assert f"data    {report.data_bytes / 1e6:.2f} MB of it in {data_of(folder).name}" in str(report)
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
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", data_of(folder).name)]
    assert min(sizes) > 0
    assert model.file_bytes == sum(sizes)
    assert model.check_parity().num_unexplained == 0
    assert ExportedModel(folder / "model.onnx", use_library=False).check_parity().max_relative_difference < 1e-5
    plain = ort.InferenceSession(folder / "model.onnx", session_options())
    assert np.array_equal(plain.run(["logits"], {"token": TOKEN, **empty_state(plain, 1)})[0], model.run(TOKEN)[0])


def test_every_command_reads_it_from_another_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model.onnx")
    assert main(["inspect", model]) == 0
    num_mb = data_of(folder).stat().st_size / 1e6
    assert f"{data_of(folder).name} {num_mb:.2f} MB" in (folder / "model.html").read_text()
    assert main(["generate", model, "--prompt", "abc", "--num-tokens", "3"]) == 0
    assert main(["bench", model, "--threads", "1", "--lengths", "4", "--rounds", "5"]) == 0
    where = ["--layer", "0", "--tile", "5", "--tag", "off", "--output"]
    assert main(["surgery", model, "remove", *where, "elsewhere/edited.onnx"]) == 0
    assert "wrote   elsewhere/edited.onnx" in capsys.readouterr().out
    data = data_of(Path("elsewhere"), "edited.onnx")
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["edited.onnx", data.name]
    single = ["surgery", str(folder / "single.onnx"), "remove", *where, "single.onnx"]
    assert main(single) == 0
    assert np.array_equal(logits(Path("elsewhere/edited.onnx")), logits(Path("single.onnx")))
    assert read_model(Path("elsewhere/edited.onnx"))[2][0].is_free_E.tolist() == [False] * 5 + [True]


def test_an_edit_leaves_its_source_alone_and_needs_no_file_of_it(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    operate_on_file(folder / "model.onnx", folder / "edited.onnx", Edit("freeze", 0, 1, "held"))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    for name in before:
        (folder / name).unlink()
    assert open_model(folder / "edited.onnx").check_parity().max_relative_difference < 1e-5
    assert set(check_external_data(folder / "edited.onnx").file_bytes) == {data_of(folder, "edited.onnx").name}


def test_no_data_of_another_model_is_touched(folder: Path) -> None:
    others = [
        "edited.onnx.data",
        "edited.onnx.0123456789ab.data.txt",
        "edited.onnx.0123456789AB.data",
        "m.data",
        "edited.onnx.a.data",
    ]
    others += ["another_edited.onnx.0123456789ab.data", data_of(folder).name]
    before = {name: (folder / name).read_bytes() if (folder / name).exists() else b"of another model" for name in others}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    operate_on_file(folder / "model.onnx", folder / "edited.onnx", Edit("freeze", 0, 1, "held"))
    assert {name: (folder / name).read_bytes() for name in others} == before


@pytest.mark.usefixtures("traced_anew")
def test_the_same_weights_are_written_to_the_same_names(tmp_path: Path) -> None:
    module, x = make_module(), torch.randn(4, WIDTH)
    written = []
    for _ in range(2):
        export(module, x, tmp_path / "m.onnx", external_data=True)
        written.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert len(written[0]) == 2
    assert written[0] == written[1]


@pytest.mark.parametrize("external_data", [True, False])
def test_a_new_export_removes_the_data_of_the_old_one(external_data: bool, tmp_path: Path) -> None:
    module, x, path = make_module(), torch.randn(4, WIDTH), tmp_path / "m.onnx"
    export(module, x, path, external_data=True)
    old = data_of(tmp_path, "m.onnx")
    (tmp_path / "m.onnx.0123456789ab.data").write_bytes(b"of a killed writer")
    module[0].weight.data.add_(1)
    report = export(module, x, path, external_data=external_data)
    expected = [path.name] if report.data_file is None else [path.name, data_of(tmp_path, "m.onnx").name]
    assert len(expected) == 1 + external_data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(expected)
    assert not old.exists()
    assert open_model(path).check_parity().max_relative_difference < 1e-5


def test_data_that_a_live_writer_is_about_to_name_stays(folder: Path) -> None:
    begun = folder / "model.onnx.0123456789ab.data"
    with begun.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_old_data(folder / "model.onnx")
        assert begun.exists()
    remove_old_data(folder / "model.onnx")
    assert not begun.exists()
    assert np.array_equal(logits(folder / "model.onnx"), logits(folder / "single.onnx"))


def test_data_of_any_plain_name_is_read(folder: Path) -> None:
    onnx.save_model(
        onnx.load(folder / "single.onnx"), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64
    )
    assert set(check_external_data(folder / "m.onnx").file_bytes) == {"m.data"}
    assert np.array_equal(logits(folder / "m.onnx"), logits(folder / "single.onnx"))


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
    assert report.data_file == data_of(tmp_path, "m.onnx").name
    assert report.file_bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", report.data_file]
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
    inner.initializer[0].external_data[0].value = "../any.data"


def many_times(proto: ModelProto) -> None:
    tensor = max(proto.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    for place in range(400):
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = f"again{place}"


def a_larger_shape(proto: ModelProto) -> None:
    external(proto).dims[0] = 2**40


def many_dims(proto: ModelProto) -> None:
    external(proto).dims.extend([2**62] * 20_000)


LOCATION = r"location of external data \(.*\) must be the name of a file in the model's folder"
HOSTILE: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "an absolute path": (entry("location", "/etc/passwd"), LOCATION),
    "a device": (entry("location", "/dev/zero"), LOCATION),
    "the folder above": (entry("location", "../any.data"), LOCATION),
    "two dots": (entry("location", ".."), LOCATION),
    "a subfolder": (entry("location", "sub/any.data"), LOCATION),
    "another system's path": (entry("location", "..\\any.data"), LOCATION),
    "nothing": (entry("location", ""), LOCATION),
    "two lines": (entry("location", "model.onnx\n.data"), LOCATION),
    "a NUL": (entry("location", "any.data\0"), LOCATION),
    "an address in memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), LOCATION),
    "a missing file": (entry("location", "none.data"), "external data none.data must lie next to the model: No such file"),
    "a link to elsewhere": (entry("location", "link.data"), "external data link.data must lie in the model's folder"),
    "a pipe": (entry("location", "pipe.data"), "external data pipe.data must be a regular file"),
    "a folder": (entry("location", "folder.data"), "external data folder.data must be a regular file"),
    "an offset beyond the file": (
        entry("offset", f"{10**12}"),
        r"external data model\.onnx\.\w+\.data: offset \(1000000000000\) \+ length \(\d+\) .* must be <= its size",
    ),
    "an offset below 0": (entry("offset", "-1"), r"offset \('-1'\) of tensor .* must be a whole number"),
    "an offset of 400 digits": (entry("offset", "9" * 400), "offset .* must be a whole number"),
    "another length": (entry("length", "7"), r"length \('7'\) of tensor .* must be that of its shape"),
    "a length of text": (entry("length", "many"), r"length \('many'\) of tensor .* must be a whole number"),
    "a key twice": (
        another_entry("location", "any.data"),
        r"key of external data \('location'\) must be one of .*, each once",
    ),
    "an unknown key": (another_entry("basepath", "/"), r"key of external data \('basepath'\) must be one of"),
    "a larger shape": (a_larger_shape, r"length \('80'\) of tensor .* must be that of its shape"),
    "many dimensions": (many_dims, r"number of dimensions of tensor .* \(2000\d\) must be <= 64"),
    "one range many times": (many_times, r"external data model\.onnx\.\w+\.data: lengths together \(\d+\) must be <= its size"),
    "a constant of a function": (in_a_function, LOCATION),
    "a constant of an inner graph": (in_an_inner_graph, LOCATION),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_says_of_its_data_is_checked_before_it_is_followed(name: str, folder: Path) -> None:
    edit, problem = HOSTILE[name]
    (folder / "link.data").symlink_to("../outside.data")
    Path("outside.data").write_bytes(data_of(folder).read_bytes())
    os.mkfifo(folder / "pipe.data")
    (folder / "folder.data").mkdir()
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(proto)
    (folder / "bad.onnx").write_bytes(proto.SerializeToString())
    for read in (ExportedModel, read_model):
        with pytest.raises(ModelFileError, match=rf"^models/bad\.onnx: {problem}"):
            read(folder / "bad.onnx")


def test_data_that_was_cut_short_is_refused(folder: Path) -> None:
    data = data_of(folder)
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(ModelFileError, match=r"external data model\.onnx\.\w+\.data: offset .* must be <= its size"):
        open_model(folder / "model.onnx")


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    data = data_of(folder)
    data.rename(folder / "moved")
    data.symlink_to("moved")
    assert np.array_equal(logits(folder / "model.onnx"), logits(folder / "single.onnx"))


def test_packed_numbers_count_as_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ort_ops.external_data.MAX_FIELDS", 50)
    (tmp_path / "m.data").write_bytes(bytes(4))
    entries = TensorProto(data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    entries.external_data.add(key="location", value="m.data")
    for num_dims in (20, 60):
        tensor = bytes([0x0A, num_dims]) + b"\1" * num_dims + entries.SerializeToString()
        graph = bytes([0x2A, len(tensor)]) + tensor
        (tmp_path / "m.onnx").write_bytes(bytes([0x3A, len(graph)]) + graph)
        if num_dims == 20:
            assert check_external_data(tmp_path / "m.onnx").file_bytes == {"m.data": 4}
    with pytest.raises(ValueError, match="number of fields of the file must be <= 50"):
        check_external_data(tmp_path / "m.onnx")
