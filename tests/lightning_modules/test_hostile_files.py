"""Files made to do harm, caused for real: each command says one line, ends with 2, and leaves every file as it was."""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile_runs import WHERE, assert_refused, commands_on, commands_on_model
from limited_memory import limited_memory

from lightning_modules.cli import main
from lightning_modules.tasks import CheckpointError, load_checkpoint, read_checkpoint

NO_CHECKPOINT = r"is not a checkpoint that can be loaded safely"
EMBEDDING, ROUTER = "network.embedding.weight", "network.stack.blocks.1.feed_forward.inner.router"
HISTORY = "network.stack.blocks.0.feed_forward.inner.surgery_log._extra_state"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    "float flags": (
        weight(f"{ROUTER}.is_free_E", lambda w: w + 0.5),
        r"is_free_E \(torch.float32\) must have dtype torch.bool",
    ),
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
    "no tile in use": (
        weight(f"{ROUTER}.is_free_E", torch.ones_like),
        r"tiles in use .* \(0\) must be >= top_k by num_raised \(1\)",
    ),
    "more tiles a token": (
        weight(f"{ROUTER}.num_raised", lambda w: w + 2**40),
        r"tiles in use .* must be >= top_k by num_raised \(\d+\)",
    ),
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
        r"datamodule_hyper_parameters \(int\) must be keys and values",
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
