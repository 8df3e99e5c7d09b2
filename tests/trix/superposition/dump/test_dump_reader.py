"""Reading dumps: in order, shuffled, and never without comparing shards and manifest."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_dumps import ragged_frame, trix_backend

from trix.superposition import DumpConfig
from trix.superposition.backends import io_store
from trix.superposition.backends.io_store import save_npy, write_shard
from trix.superposition.dump import ActivationDump, build_offsets, dump_layer_activations, reader, stream_shards

CFG = DumpConfig(layer=0, max_len=40, batch_size=16, shard_tokens=300)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dump")
    dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), CFG, folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(1, 30), max_size=5), batch=st.integers(1, 40), is_npy=st.booleans())
def test_a_stream_is_all_rows_in_order(
    rows: list[int], batch: int, is_npy: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    x_ND = torch.arange(sum(rows) * 2).reshape(-1, 2).half()
    paths = []
    for index, part in enumerate(x_ND.split(rows)):
        paths.append(folder / (f"shard_{index}_acts.npy" if is_npy else f"shard_{index}.safetensors"))
        if is_npy:
            save_npy(paths[-1], part.numpy())
        else:
            write_shard(paths[-1], {"acts": part.clone()})
    batches = list(stream_shards(paths, batch))
    assert all(len(found) == batch for found in batches[:-1])
    assert all(found.dtype == torch.float32 for found in batches)
    assert torch.equal(torch.cat([*batches, torch.zeros(0, 2)]), x_ND.float())
    assert build_offsets(paths).tolist() == [sum(rows[:index]) for index in range(len(rows) + 1)]
    assert build_offsets(paths).dtype == "int64"


def test_a_batch_has_at_least_one_row() -> None:
    with pytest.raises(ValueError, match=r"batch \(0\) must be >= 1"):
        stream_shards([], 0)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_ROWS", 16)
    monkeypatch.setattr(reader, "WINDOW_ROWS", 128)


def keys(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, int]]:
    return [
        (int(document), int(position))
        for batch in batches
        for document, position in zip(batch["titleidx"], batch["position"], strict=True)
    ]


COLUMNS = ("acts", "titleidx", "position", "score")


@pytest.mark.usefixtures("small_windows")
def test_a_shuffled_epoch_is_all_rows_once(original: Path) -> None:
    dump = ActivationDump(original)
    batches = list(dump.shuffled(50, seed=3, columns=COLUMNS))
    assert [len(batch["acts"]) for batch in batches[:-1]] == [50] * (-(-len(dump) // 50) - 1)
    in_order = list(zip(dump.column("titleidx").tolist(), dump.column("position").tolist(), strict=True))
    assert sorted(keys(batches)) == sorted(in_order)
    place = {key: row for row, key in enumerate(in_order)}
    row_N = torch.tensor([place[key] for key in keys(batches)])
    acts_ND = torch.cat(list(stream_shards(dump.paths)))
    assert torch.equal(torch.cat([batch["acts"] for batch in batches]), acts_ND[row_N])
    assert torch.equal(torch.cat([batch["score"] for batch in batches]), dump.column("score")[row_N])
    neighbours = (row_N.diff() == 1).float().mean()
    assert neighbours < 0.05
    assert abs(torch.corrcoef(torch.stack([row_N, torch.arange(len(row_N))]))[0, 1]) < 0.3


@pytest.mark.usefixtures("small_windows")
def test_the_order_is_a_function_of_seed_and_epoch(original: Path) -> None:
    dump = ActivationDump(original)
    orders = {
        (seed, epoch): keys(list(dump.shuffled(50, seed=seed, epoch=epoch, columns=COLUMNS)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 0] == keys(list(dump.shuffled(50, seed=1, columns=COLUMNS)))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("batch_size", [7, 50, 128, 1000])
def test_a_stream_goes_on_at_any_batch(batch_size: int, original: Path) -> None:
    dump = ActivationDump(original)
    whole = keys(list(dump.shuffled(batch_size, columns=COLUMNS)))
    num_batches = -(-len(dump) // batch_size)
    for start in {0, 1, 2, num_batches // 2, num_batches - 1, num_batches}:
        rest = keys(list(dump.shuffled(batch_size, start=start, columns=COLUMNS)))
        assert rest == whole[start * batch_size :]


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 0.99), seed=st.integers(0, 100), named=st.one_of(st.none(), st.sets(st.integers(0, 119), max_size=60))
)
def test_documents_are_held_out_whole(share: float, seed: int, named: set[int] | None, original: Path) -> None:
    dump = ActivationDump(original)
    held_out = share if named is None else np.array(sorted(named), dtype=np.int64)
    documents = set(dump.column("titleidx").tolist())
    found = {part: keys(list(dump.shuffled(50, seed, 1, 0, COLUMNS, part, held_out))) for part in ("training", "validation")}
    assert sorted(found["training"] + found["validation"]) == sorted(keys(list(dump.shuffled(50, columns=COLUMNS))))
    training, validation = ({document for document, _ in rows} for rows in found.values())
    assert training & validation == set()
    assert len(validation) == round(share * len(documents)) if named is None else validation == named & documents
    for part, rows in found.items():
        chunks = dump.chunks(part, held_out, seed)  # type: ignore[arg-type]
        assert dump.num_rows(part, held_out, seed) == len(rows)  # type: ignore[arg-type]
        assert len(chunks) == 0 or 1 <= (chunks[:, 2] - chunks[:, 1]).min() <= (chunks[:, 2] - chunks[:, 1]).max() <= 16


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be >= 1"),
        ({"batch_size": 10, "epoch": -1}, r"epoch \(-1\) >= 0"),
        ({"batch_size": 10**6, "start": 2}, r"start \(2\) must be >= 0 and <= number of batches \(1\)"),
        ({"batch_size": 10, "columns": ("tiles",)}, r"column \('tiles'\) must be one of acts, labels, .*tile, score"),
    ],
)
def test_wrong_arguments_of_a_stream_are_refused_at_once(arguments: dict[str, Any], problem: str, original: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        ActivationDump(original).shuffled(**arguments)


def test_the_share_held_out_is_checked_when_rows_are_counted(original: Path) -> None:
    with pytest.raises(ValueError, match=r"held_out \(1\.5\) must be >= 0 and < 1"):
        ActivationDump(original).num_rows("training", 1.5)


def test_a_small_file_cannot_claim_many_rows(folder: Path) -> None:
    rows, path = 10**12, folder / "shard_00000.safetensors"
    manifest = json.loads((folder / "manifest.json").read_text())
    columns = {name: ("I64", [rows]) for name in manifest["columns"]} | {"acts": ("BF16", [rows, 32]), "score": ("F32", [rows])}
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]} for name, (dtype, shape) in columns.items()}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    manifest |= {"shards": [{"tokens": rows, "bytes": path.stat().st_size}], "tokens": rows}
    manifest["identity"]["settings"]["shard_tokens"] = rows
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="must be a safetensors file"):
        ActivationDump(folder)
    with pytest.raises(ValueError, match="must be a safetensors file"):
        build_offsets([path])


def test_acts_are_no_column_to_hold_at_once(original: Path) -> None:
    with pytest.raises(ValueError, match=r"column \('acts'\) must be one of labels, tokids"):
        ActivationDump(original).column("acts")


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_shard_cut_short_is_named_with_both_sizes(cut: int, folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    problem = rf"shard_00001.safetensors \({len(content) - cut} bytes\) must have the {len(content)} bytes .* cut short"
    with pytest.raises(ValueError, match=problem):
        ActivationDump(folder)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("place", [-1, 5000])
def test_a_flipped_bit_is_found_when_its_shard_is_first_read(index: int, place: int, folder: Path) -> None:
    path = folder / f"shard_{index:05d}.safetensors"
    content = bytearray(path.read_bytes())
    expected = zlib.crc32(content)
    content[place] ^= 4
    path.write_bytes(content)
    problem = rf"{path.name}: CRC-32 of the file \({zlib.crc32(content):08x}\) must be that of the manifest \({expected:08x}\)"
    dump = ActivationDump(folder)
    for read in (
        lambda: list(dump.shuffled(50)),
        lambda: list(stream_shards(dump.paths)),
        lambda: dump.column("labels"),
        lambda: dump.num_rows("training", 0.5),
    ):
        with pytest.raises(ValueError, match=problem):
            read()


def test_a_shard_is_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Path] = []
    monkeypatch.setattr(io_store, "file_crc32", lambda path: sums.append(path) or zlib.crc32(path.read_bytes()))
    for _ in range(2):
        dump = ActivationDump(folder)
        assert sums == [] or len(sums) == len(dump.paths)  # opening reads nothing
        list(dump.shuffled(50))
        dump.column("labels")
    assert sorted(sums) == dump.paths


def test_a_manifest_without_checksums_is_read(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert shard.pop("crc32") > 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "shard_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    dump = ActivationDump(folder)
    assert sum(len(batch) for batch in stream_shards(dump.paths)) == len(dump)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard_00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00001.safetensors"):
        ActivationDump(folder)


def test_a_shard_of_another_dtype_or_shape_is_refused(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    content = path.read_bytes()
    for old, new in ((b'"BF16"', b'"F16" '), (b"[300,32]", b"[32,300]"), (b'"tile"', b'"tame"')):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=r"shard_00001.safetensors: columns \(.*\) must be those of the manifest \("):
            ActivationDump(folder)


def _set(*place: str | int, value: Any) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in place[:-1]:
            manifest = manifest[key]
        manifest[place[-1]] = value

    return change


def _empty(manifest: Any) -> None:
    manifest.update(shards=[], tokens=0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_empty, r"shards of a complete dump \(0\) must be >= 1"),
        (_set("tokens", value=1), r"tokens \(1\) must be those of the shards \(\d+\)"),
        (_set("shards", 0, "tokens", value=299), r"tokens (of shard 0 \(299\)|\(\d+\)) must be"),
        (_set("identity", "settings", "shard_tokens", value=200), r"tokens of shard 0 \(300\) must be shard_tokens \(200\)"),
        (_set("identity", "dtype", value="int8"), "identity.dtype .'int8'. is wrong"),
        (_set("identity", "layer", value="0"), "identity.layer .'0'. is wrong"),
        (_set("d_model", value=64), r"columns \(.*\) must be those of the manifest"),
        (_set("columns", value=["acts"]), r"columns \(acts\) must be acts, labels, tokids, titleidx, position, tile, score"),
        (_set("columns", value=["acts", "labels", "tokids", "titleidx", "position", "../x"]), r"columns \(.*\) must be acts,"),
        (_set("extra", value=1), "extra .1. is wrong"),
        (_set("format", value=2), "format .2. is wrong"),
        (_set("cursor", value={"batch": 3, "rows": 1}), r"tokens of shard 8 \(38\) must be shard_tokens \(300\)"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_its_shards_is_refused(
    change: Callable[[Any], None], problem: str, folder: Path
) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=problem):
        ActivationDump(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5])
def test_a_manifest_that_is_no_record_is_refused(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json: content"):
        ActivationDump(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["manifest.json", "shard_00000.safetensors"]),
    place=st.integers(0, 900),
    removed=st.integers(0, 8),
    added=st.one_of(st.binary(max_size=9), st.sampled_from([b"-1", b"1e999", b"null", b"[]", b"{}", b'"../x"', b"9" * 5000])),
)
def test_changed_files_are_refused_or_read_whole(name: str, place: int, removed: int, added: bytes, folder: Path) -> None:
    content, problem = (folder / name).read_bytes(), None
    (folder / name).write_bytes(content[:place] + added + content[place + removed :])
    try:
        dump = ActivationDump(folder)
        rows = sum(len(batch) for batch in stream_shards(dump.paths))
        assert rows == len(dump) == len(dump.column("labels"))
    except (ValueError, OSError) as error:
        problem = str(error)
    finally:
        (folder / name).write_bytes(content)
    assert problem is None or str(folder) in problem
