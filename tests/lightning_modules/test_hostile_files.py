"""Files made to do harm, caused for real: each command says one line, ends with 2, and leaves every file as it was."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import lightning as L
import onnx
import pytest
import torch
from limited_memory import limited_memory
from onnx import ModelProto
from small_runs import SENTENCE, save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import CheckpointError, LanguageModelTask, load_checkpoint, read_checkpoint
from lightning_modules.yaml_files import check_yaml, read_yaml

NO_CHECKPOINT = r"is not a checkpoint that can be loaded safely"
EMBEDDING, ROUTER = "network.embedding.weight", "network.stack.blocks.1.ffn.router"
HISTORY = "network.stack.blocks.0.ffn.surgery_log._extra_state"
WHERE = ["--layer", "0", "--tile", "0", "--tag", "t", "--output"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an honest run leaves: a checkpoint, the model exported from it, and its text."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    L.seed_everything(0)
    save_checkpoint(LanguageModelTask(text.vocabulary, small_network()), text, folder / "lm.ckpt")
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(folder / "lm.onnx")]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def assert_refused(arguments: list[str], problem: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = state_of(folder)
    capfd.readouterr()
    with limited_memory():
        assert main(arguments) == 2, arguments
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if "[E:onnxruntime" not in line]  # its own log of what it cannot run
    assert len(lines) == 1, (arguments, err)
    assert re.match(f"trix: error: .*{problem}", lines[0]), (arguments, lines[0])
    assert state_of(folder) == before


def commands_on(ckpt: str) -> list[list[str]]:
    return [
        ["inspect", ckpt],
        ["why", ckpt, "--prompt", "The "],
        ["export", "--ckpt", ckpt, "--output", "new/model.onnx"],
        ["surgery", ckpt, "freeze", *WHERE, "new/edited.ckpt"],
    ]


def commands_on_model(model: str) -> list[list[str]]:
    return [
        ["inspect", model],
        ["generate", model, "--prompt", "The ", "--num-tokens", "3"],
        ["bench", model, "--threads", "1", "--lengths", "4"],
        ["surgery", model, "freeze", *WHERE, "new/edited.onnx"],
    ]


def loads(content: bytes) -> dict[str, Any]:
    Path("honest.ckpt").write_bytes(content)
    checkpoint: dict[str, Any] = torch.load("honest.ckpt", weights_only=True)
    Path("honest.ckpt").unlink()
    return checkpoint


def overlapping(content: bytes) -> bytes:
    """A zip whose directory names the same bytes many times."""
    Path("zip.tmp").write_bytes(content)
    with zipfile.ZipFile("zip.tmp", "a") as archive:
        archive.start_dir = len(content)
        largest = max(archive.filelist, key=lambda part: part.file_size)
        for number in range(1000, 1400):
            copied = zipfile.ZipInfo(f"{largest.filename.split('/')[0]}/data/{number}")
            copied.header_offset, copied.CRC = largest.header_offset, largest.CRC
            copied.file_size = copied.compress_size = largest.file_size
            archive.filelist.append(copied)
        archive._didModify = True  # type: ignore[attr-defined]
    changed = Path("zip.tmp").read_bytes()
    Path("zip.tmp").unlink()
    return changed


def huge_directory(content: bytes) -> bytes:
    end = content.rindex(b"PK\5\6")
    return content[:end] + b"\0" * 2**25 + b"PK\5\6" + b"\0" * 4 + b"\xff" * 4 + (2**25).to_bytes(4, "little") + b"\0" * 6


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "compressed": (
        lambda content: hostile.with_pickle(content, lambda pickled: pickled, zipfile.ZIP_DEFLATED),
        "must not be compressed",
    ),
    "the same bytes under many names": (overlapping, r"the size of its parts \(\d+ bytes\) must be <= the file's \(\d+\)"),
    "a directory of 32 MiB": (huge_directory, r"the directory of its parts \(33554432 bytes\) must be <= 16777216"),
    "legacy": (lambda _: hostile.legacy({"trix": {"version": 1}}), NO_CHECKPOINT),
    "torchscript": (lambda _: hostile.torchscript(), "is not a checkpoint: its part .* must not be compressed"),
    "a pickle alone": (lambda _: hostile.call_of("os", "getpid", 0), NO_CHECKPOINT),
    "2 million lists": (
        lambda content: hostile.with_pickle(content, lambda _: b"\x80\x02(" + b"]" * 2_000_000 + b"l."),
        "the steps that build its values must be <= 1000000",
    ),
    "lists in lists": (
        lambda content: hostile.with_pickle(content, lambda _: hostile.nested_lists(200_000)),
        "the depth of its values must be <= 64",
    ),
    "lists of the same lists": (
        lambda _: hostile.saved(hostile.doubled_lists(60)),
        "the number of its values must be <= 1000000",
    ),
    "bytes of any number": (
        lambda content: hostile.with_pickle(content, lambda _: hostile.call_of("__builtin__", "bytearray", 2**40)),
        r"must hold tensors and plain values only, not __builtin__.bytearray",
    ),
    "a tensor of any number": (
        lambda content: hostile.with_pickle(content, lambda _: hostile.call_of("torch", "FloatTensor", 2**40)),
        r"must hold tensors and plain values only, not torch.FloatTensor",
    ),
    "more storage than there is": (
        lambda content: hostile.with_pickle(content, lambda pickled: pickled.replace(b"K\x10\x85q", b"K\xff\x85q", 1)),
        NO_CHECKPOINT,
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, problem = ARCHIVES[name]
    Path("bad.ckpt").write_bytes(change(originals["lm.ckpt"]))
    for arguments in commands_on("bad.ckpt")[:1]:  # all read by load_checkpoint
        assert_refused(arguments, problem, folder, capfd)


def network(**sizes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["hyper_parameters"]["network"].update(sizes)


def ffn(**sizes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["hyper_parameters"]["network"]["ffn"].update(sizes)


def weight(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["state_dict"].update({name: change(c["state_dict"][name])})


def with_value(value: float, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def bytes_of(text: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: torch.tensor(list(text), dtype=torch.uint8)


NO_FIT = "the hyperparameters of the checkpoint do not fit: "
CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "width of 2**34": (network(d_model=2**34), NO_FIT),
    "a negative width": (network(d_model=-16), NO_FIT),
    "a width that is text": (network(d_model="16"), NO_FIT),
    "a width of 400 digits": (network(d_model=2 * 10**400), NO_FIT),
    "ten million layers": (network(num_layers=10**7), r"num_layers \(10000000\) must equal the number of blocks .* \(2\)"),
    "no layers": (network(num_layers=-1), r"num_layers \(-1\) must equal the number of blocks in the weights \(2\)"),
    "2**34 heads": (network(n_heads=2**34), NO_FIT),
    "a context of 2**40": (network(context_length=2**40), r"tables of positions.* elements\), must be <= 67108864"),
    "a negative context": (network(context_length=-1), NO_FIT),
    "a context of 10**30": (network(context_length=10**30), NO_FIT),
    "2**34 tiles": (ffn(num_tiles=2**34), "do not fit the network: size mismatch"),
    "2**34 tiles of another kind": (ffn(num_tiles=2**34, kind="sparse_lookup_v2"), "do not fit the network: "),
    "2**20 clustered tiles": (ffn(num_tiles=2**20, kind="hierarchical"), "do not fit the network: "),
    "a layer of width 2**40": (ffn(d_ff=2**40), "do not fit the network: size mismatch"),
    "a large vocabulary": (
        lambda c: c["hyper_parameters"].update(vocabulary="".join(map(chr, range(0xD000)))),
        "size mismatch",
    ),
    "half a surrogate": (
        lambda c: c["hyper_parameters"].update(vocabulary="\ud800" + c["hyper_parameters"]["vocabulary"][1:]),
        r"the hyperparameters must be valid Unicode",
    ),
    "NaN": (weight(EMBEDDING, with_value(math.nan, 3, 5)), r"weight embedding.weight must be finite: it is nan at \[3, 5\]"),
    "infinity": (weight(EMBEDDING, with_value(-math.inf, 0, 0)), "weight embedding.weight must be finite: it is -inf at"),
    "a bias of -inf": (weight(f"{ROUTER}.balance_bias", with_value(-math.inf, 2)), r"must be finite: it is -inf at \[2\]"),
    "int8": (
        weight(EMBEDDING, lambda w: w.to(torch.int8)),
        r"dtype of network.embedding.weight \(torch.int8\) must be float16",
    ),
    "bool": (weight(EMBEDDING, lambda w: w > 0), r"dtype of .* \(torch.bool\) must be float16, "),
    "complex": (weight(EMBEDDING, lambda w: w + 1j), r"dtype of .* \(torch.complex64\) must be float16, "),
    "float flags": (weight(f"{ROUTER}.is_free_E", lambda w: w + 0.5), r"dtype of .* \(torch.float32\) must be torch.bool"),
    "no tensor": (weight(EMBEDDING, lambda _: 5), r"network.embedding.weight \(int\) of the checkpoint must be a plain tensor"),
    "sparse": (weight(EMBEDDING, lambda w: w.to_sparse()), NO_CHECKPOINT),
    "2**34 elements of one": (
        weight(EMBEDDING, lambda _: torch.zeros(1).expand(2**17, 2**17)),
        r"a tensor of shape \(131072, 131072\) \(\d+ bytes\) must be stored in full \(4\)",
    ),
    "one storage under many names": (
        lambda c: c["state_dict"].update({f"more.{i}": c["state_dict"][EMBEDDING].detach().view(-1) for i in range(200)}),
        r"the size of its tensors \(\d+ bytes\) must be <= twice the file's \(\d+\)",
    ),
    "no tile in use": (weight(f"{ROUTER}.is_free_E", torch.ones_like), r"top_k \(1\) must be >= 1 and <= tiles in use \(0\)"),
    "more tiles a token": (weight(f"{ROUTER}.num_raised", lambda w: w + 2**40), r"top_k \(\d+\) must be >= 1 and <= tiles"),
    "a history that is no JSON": (weight(HISTORY, bytes_of(b"{no")), "do not fit the network: "),
    "a history in lists": (weight(HISTORY, bytes_of(b"[" * 200_000)), "do not fit the network: "),
    "a history of floats": (weight(HISTORY, lambda w: w.float()), r"_extra_state \(torch.float32 \(\d+,\)\) .* must be bytes"),
    "a history that is a number": (
        weight(HISTORY, lambda _: torch.tensor(2**40)),
        r"_extra_state \(torch.int64 \(\)\) .* must be",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, problem = CHECKPOINTS[name]
    checkpoint = loads(originals["lm.ckpt"])
    change(checkpoint)
    torch.save(checkpoint, "bad.ckpt")
    with limited_memory(), pytest.raises(CheckpointError, match=f"^bad.ckpt.*{problem}"):
        load_checkpoint("bad.ckpt")
    if name in ("width of 2**34", "NaN", "no tile in use"):
        for arguments in commands_on("bad.ckpt"):
            assert_refused(arguments, problem, folder, capfd)


def data(**settings: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["datamodule_hyper_parameters"].update(settings)


DATA_SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a context of 10**12": (data(context_length=10**12), r"must be >= context_length \+ 1 \(1000000000001\)"),
    "a batch of 10**400": (data(batch_size=10**400), r"batch_size \(\d+"),
    "a batch of -1": (data(batch_size=-1), r"batch_size \(-1\) must be >= 1"),
    "a seed of text": (data(seed="0"), r"seed \('0'\) must be an int"),
    "a fraction that is NaN": (data(validation_fraction=math.nan), r"validation_fraction \(nan\) must be in \(0, 1\)"),
    "a digest that is a number": (data(sha256=5), r"sha256 \(5\) must be a str"),
    "a path that is a list": (data(path=["text.txt"]), r"path \(\['text.txt'\]\) must be a str"),
    "no such corpus": (data(path=None, corpus=[[]]), r"corpus \(\[\[\]\]\) must be one of pydoc, "),
    "another setting": (data(colour="red"), "the data settings of the checkpoint do not fit: .*colour"),
    "no settings": (
        lambda c: c.update(datamodule_hyper_parameters=5),
        r"data module \(TextDataModule\) must be TextDataModule",
    ),
    "a device": (data(path="/dev/zero"), "text file /dev/zero cannot be read: it must be a regular file, not a device"),
    "a pipe": (data(path="pipe"), "text file pipe cannot be read: it must be a regular file, not a pipe"),
    "a socket": (data(path="socket"), "text file socket cannot be read: it must be a regular file, not a socket"),
    "a folder": (data(path="."), "text file . cannot be read: Is a directory"),
    "100 GB": (data(path="large"), r"text file large cannot be read: its size \(\d{12} bytes\) must be <= 2147483648"),
    "a NUL in the name": (data(path="a\0b"), r"text file a.*b cannot be read: embedded null"),
}


@pytest.mark.parametrize("name", DATA_SETTINGS)
def test_data_settings(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, problem = DATA_SETTINGS[name]
    checkpoint = loads(originals["lm.ckpt"])
    change(checkpoint)
    torch.save(checkpoint, "bad.ckpt")
    hostile.pipe(Path("pipe"))
    hostile.listening_socket(Path("socket"))
    hostile.sparse(Path("large"), 10**11)
    for arguments in (["inspect", "bad.ckpt"], ["export", "--ckpt", "bad.ckpt", "--output", "new/model.onnx"]):
        assert_refused(arguments, problem, folder, capfd)


def test_a_huge_batch_is_all_the_text(originals: dict[str, bytes], folder: Path) -> None:
    checkpoint = loads(originals["lm.ckpt"])
    Path("text.txt").write_bytes(originals["text.txt"])
    data(batch_size=2**62, batches_per_epoch=2**62, path="text.txt")(checkpoint)
    torch.save(checkpoint, "large.ckpt")
    with limited_memory():
        assert main(["inspect", "large.ckpt"]) == 0


NOT_REGULAR: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe": (hostile.pipe, "it must be a regular file, not a pipe"),
    "socket": (hostile.listening_socket, "it must be a regular file, not a socket"),
}
READERS = [
    ["inspect", "{}.ckpt"],
    ["why", "{}.ckpt", "--prompt", "a"],
    ["export", "--ckpt", "{}.ckpt", "--output", "m.onnx"],
    ["surgery", "{}.ckpt", "freeze", *WHERE, "new.ckpt"],
    ["inspect", "{}.onnx"],
    ["generate", "{}.onnx", "--prompt", "a"],
    ["bench", "{}.onnx"],
    ["surgery", "{}.onnx", "freeze", *WHERE, "new.onnx"],
]


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: f"{arguments[0]} {arguments[1]}")
def test_only_regular_files_are_opened(
    kind: str, arguments: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, problem = NOT_REGULAR[kind]
    make(Path("odd.ckpt"))
    make(Path("odd.onnx"))
    assert_refused([argument.format("odd") for argument in arguments], problem, folder, capfd)


@pytest.mark.parametrize("arguments", [["inspect", "/dev/zero"], ["why", "/dev/zero", "--prompt", "a"]])
def test_devices_are_not_opened(arguments: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused([*arguments, *(["--output", "a.html"] if arguments[0] == "inspect" else [])], "not a device", folder, capfd)


def test_a_model_above_the_limit_of_protobuf(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile.sparse(Path("large.onnx"), 10**11)
    for arguments in commands_on_model("large.onnx"):
        assert_refused(arguments, r"its size \(100000000000 bytes\) must be <= 2147483647", folder, capfd)


def test_a_checkpoint_of_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile.sparse(Path("large.ckpt"), 10**11)
    assert_refused(["inspect", "large.ckpt"], NO_CHECKPOINT, folder, capfd)


SIGNATURES: dict[str, tuple[str, str]] = {
    "no JSON": ("{no", "signature.json must hold JSON: "),
    "lists in lists": ("[" * 100_000, "signature.json must hold JSON: "),
    "thousands of digits": ("[" + "9" * 10_000 + "]", "signature.json must hold JSON: .*limit"),
    "400 digits": (f"[{10**400}]", "signature.json must hold the numbers -1, 0 and 1"),
    "infinity": ("[" + ",".join(["1e999"] * 16) + "]", "signature.json must hold the numbers -1, 0 and 1, not inf"),
    "NaN": ("[" + ",".join(["NaN"] * 16) + "]", r"\(nan\) must be -1, 0 or 1"),
    "a place of 400 digits": (json.dumps({"positive_dims": [10**400], "negative_dims": []}), r"must be >= 0 and < d_model"),
    "text": ('"' + "x" * 10_000 + '"', "must be a row of"),
    "above the limit": ("[" + "0," * 2**22 + "0]", r"its size \(\d+ bytes\) must be <= 4194304"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str, originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, problem = SIGNATURES[name]
    Path("signature.json").write_text(text)
    for ending in ("ckpt", "onnx"):
        Path(f"lm.{ending}").write_bytes(originals[f"lm.{ending}"])
        insert = ["surgery", f"lm.{ending}", "insert", "--signature", "signature.json", *WHERE, f"new/new.{ending}"]
        assert_refused(insert, problem, folder, capfd)


def test_a_signature_is_read_from_a_regular_file(
    originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("lm.onnx").write_bytes(originals["lm.onnx"])
    hostile.pipe(Path("pipe"))
    for name, kind in (("pipe", "a pipe"), ("/dev/zero", "a device")):
        insert = ["surgery", "lm.onnx", "insert", "--signature", name, *WHERE, "new.onnx"]
        assert_refused(insert, f"it must be a regular file, not {kind}", folder, capfd)


def bomb() -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])


YAML_FILES: dict[str, tuple[bytes, str]] = {
    "aliases of aliases": (bomb().encode(), "line 5: the number of values must be <= 50000"),
    "100,000 brackets": (b"a: " + b"[" * 100_000, "line 1: the depth of the values must be <= 50"),
    "100,000 dashes": (b"- " * 100_000, "line 1: the depth of the values must be <= 50"),
    "a thousand keys within keys": ("".join(f"{' ' * i}a:\n" for i in range(1000)).encode(), "the depth of the values"),
    "itself": (b"a: &a\n  b: *a\n", "line 2: a value of the configuration must not hold itself"),
    "a tab": (b"a:\n\tb: 1", r"must be YAML: .* \(line 2\)"),
    "binary": (b"\x80\x02\x00\xff", "must be YAML in UTF-8: byte 0x80 at 0 is not"),
    "control characters": (b"a: \x00", "must be YAML: "),
    "a call": (
        b"a: !!python/object/apply:os.system ['ls']",
        r"tag \(tag:yaml.org,2002:python/object/apply:os.system\) must be",
    ),
    "an object": (b"!!python/object:os.PathLike {}", r"tag \(tag:yaml.org,2002:python/object:os.PathLike\) must be"),
    "thousands of digits": (b"a: " + b"1:" * 10_000 + b"1", r"length of a value without quotes \(20001\) must be <= 4096"),
    "many values": (b"[" + b"a," * 60_000 + b"]", "the number of values must be <= 50000"),
    "1 MiB": (b"#" * (2**20 + 1), r"its size \(1048577 bytes\) must be <= 1048576"),
    "two documents": (b"a: 1\n---\nb: 2\n", "must be YAML: "),
    "no such day": (b"a: 2020-13-45", "must be YAML: month must be in"),
    "a list as a key": (b"? [1, 2]\n: 3", "must be YAML: "),
}


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml(name: str, folder: Path) -> None:
    content, problem = YAML_FILES[name]
    Path("bad.yaml").write_bytes(content)
    with limited_memory(2**28), pytest.raises(UserError, match=f"^bad.yaml.*{problem}") as caught:
        read_yaml("bad.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_of_another_kind_than_a_regular_file(folder: Path) -> None:
    hostile.pipe(Path("pipe"))
    hostile.sparse(Path("large"), 2**30)
    for path, problem in (("pipe", "not a pipe"), ("/dev/zero", "not a device"), ("large", "must be <="), (".", "directory")):
        with pytest.raises(UserError, match=f"{path} cannot be read: .*{problem}"):
            check_yaml(path)


def test_honest_yaml_is_read_as_it_is(folder: Path) -> None:
    Path("a.yaml").write_text("\ufeffa: &a {b: 1e-3, c: [null, true]}\nd: *a\ne:\n  <<: *a\n  c: text\n", encoding="utf-8")
    values = {"b": "1e-3", "c": [None, True]}  # YAML 1.1: a float has a point
    assert read_yaml("a.yaml") == {"a": values, "d": values, "e": values | {"c": "text"}}


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


def test_events_that_are_no_regular_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    hostile.pipe(Path("runs/events.out.tfevents.1"))
    assert_refused(["runs"], "events.out.tfevents.1 cannot be read: it must be a regular file, not a pipe", folder, capfd)
    Path("runs/events.out.tfevents.1").unlink()
    hostile.sparse(Path("runs/events.out.tfevents.1"), 10**11)
    assert_refused(["runs"], r"events.out.tfevents.1 cannot be read: its size \(\d+ bytes\) must be <=", folder, capfd)


def test_links_that_lead_nowhere(originals: dict[str, bytes], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/best.ckpt").symlink_to("gone")
    for arguments in commands_on("run"):
        assert_refused(arguments, "best.ckpt cannot be read: No such file or directory", folder, capfd)


def test_honest_files_are_read_within_the_same_limits(originals: dict[str, bytes], folder: Path) -> None:
    for name, content in originals.items():
        Path(name).write_bytes(content)
    with limited_memory():
        assert read_checkpoint("lm.ckpt")["global_step"] == 1
        for arguments in (*commands_on("lm.ckpt"), *commands_on_model("lm.onnx")):
            assert main(arguments) == 0, arguments
