"""Columns on disk: safetensors shards and .npy files give the same, and damaged files are named."""

import os
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import numpy as np
import torch

from trix.superposition.backends.io_store import (
    column_rows,
    load_npy,
    num_rows,
    read_column,
    save_npy,
    shard_columns,
    shard_paths,
    write_shard,
)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard_00000.safetensors"
    acts = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    write_shard(path, {"acts": acts, "labels": torch.tensor([3, 1, 2, 0])})
    return path


def test_an_array_comes_back_as_it_was(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    save_npy(tmp_path / "deep" / "a.npy", array)
    for mmap in (True, False):
        found = load_npy(tmp_path / "deep" / "a.npy", mmap=mmap)
        assert isinstance(found, np.memmap) == mmap
        np.testing.assert_array_equal(found, array)


def test_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    objects = np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_npy(tmp_path / "a.npy", objects)
    assert list(tmp_path.iterdir()) == []
    np.save(tmp_path / "b.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "c.npz", np.zeros(2))
    (tmp_path / "c.npz").rename(tmp_path / "c.npy")
    (tmp_path / "d.npy").write_bytes(b"text")
    for name in "bcd":
        for mmap in (True, False):
            with pytest.raises(ValueError, match=rf"{name}\.npy.*must (be a whole .npy file of numbers|hold one array)"):
                load_npy(tmp_path / f"{name}.npy", mmap=mmap)


def test_an_array_that_was_cut_short_is_named(tmp_path: Path) -> None:
    save_npy(tmp_path / "a.npy", np.zeros(100))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-8])
    for mmap in (True, False):
        with pytest.raises(ValueError, match=rf"a\.npy \({len(content) - 8} bytes\) must be a whole"):
            load_npy(tmp_path / "a.npy", mmap=mmap)


def test_columns_and_rows_of_a_shard(shard: Path) -> None:
    assert read_column(shard, "acts").dtype == torch.bfloat16
    assert read_column(shard, "labels").tolist() == [3, 1, 2, 0]
    assert column_rows(shard, "acts", 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert num_rows(shard) == 4
    assert shard_columns(shard) == {"acts": ("BF16", (4, 3)), "labels": ("I64", (4,))}
    with pytest.raises(ValueError, match=r"columns \(.*\) must include tile"):
        read_column(shard, "tile")


def test_npy_files_of_a_shard_are_columns_too(tmp_path: Path) -> None:
    acts = np.arange(12, dtype=np.float32).reshape(4, 3)
    save_npy(tmp_path / "shard_00000_acts.npy", acts)
    save_npy(tmp_path / "shard_00000_labels.npy", np.array([3, 1, 2, 0], dtype=np.int16))
    (path,) = shard_paths(tmp_path, "acts")
    assert read_column(path, "acts").tolist() == acts.tolist()
    for of_column in (path, tmp_path / "shard_00000_labels.npy"):
        assert read_column(of_column, "labels").tolist() == [3, 1, 2, 0]
        assert read_column(of_column, "labels").dtype == torch.int64
    assert column_rows(path, "acts", 1, 3).tolist() == acts[1:3].tolist()
    assert num_rows(path) == 4


def test_shards_are_found_in_order(tmp_path: Path) -> None:
    for index in (10, 2, 0):
        (tmp_path / f"shard_{index:05d}_acts.npy").touch()
        (tmp_path / f"shard_{index:05d}_labels.npy").touch()
    assert [path.name[6:11] for path in shard_paths(tmp_path, "acts")] == ["00000", "00002", "00010"]
    assert {path.name[11:] for path in shard_paths(tmp_path, "labels")} == {"_labels.npy"}
    (tmp_path / "shard_00000.safetensors").touch()
    with pytest.raises(ValueError, match=r"must hold shards: shard_\*.safetensors \(1\) or \*_acts.npy \(3\)"):
        shard_paths(tmp_path, "acts")
    with pytest.raises(ValueError, match=r"shard_\*.safetensors \(0\) or \*_acts.npy \(0\)"):
        shard_paths(tmp_path / "none", "acts")


@pytest.mark.parametrize("change", [-1, -40, 5])
def test_a_shard_of_another_size_is_named_with_both_sizes(change: int, shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:change] if change < 0 else content + b"x" * change)
    why = "cut short" if change < 0 else "changed"
    problem = rf"shard_00000.safetensors \({len(content) + change} bytes\) must have the {len(content)} bytes .* was {why}"
    with pytest.raises(ValueError, match=problem):
        read_column(shard, "labels")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"header \(0 bytes\) must be > 0"),
        (b"\xff" * 100, r"header \(18446744073709551615 bytes\) must be > 0 and <= 1048576 bytes"),
        ((50).to_bytes(8, "little") + b"{", r"\(9 bytes\) must hold its header of 50 bytes: the file was cut short"),
        ((2).to_bytes(8, "little") + b"{}", "header must be that of a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "header must be that of a safetensors file"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "header must be that of a safetensors file"),
        ((13).to_bytes(8, "little") + b'{"acts":null}', "header must be that of a safetensors file"),
    ],
)
def test_a_file_that_is_no_shard_is_named(content: bytes, problem: str, shard: Path) -> None:
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000.safetensors.*" + problem):
        read_column(shard, "acts")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["shard_00000_acts.npy", "shard_00000.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="must be a regular file, not a pipe"):
        read_column(tmp_path / name, "acts")


def test_a_header_that_lies_about_its_columns_is_refused(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"shape":[4,3]', b'"shape":[9,3]'))
    with pytest.raises(ValueError, match=r"shard_00000.safetensors must be a safetensors file"):
        read_column(shard, "acts")
