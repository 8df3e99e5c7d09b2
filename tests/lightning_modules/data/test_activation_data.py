"""Activations of a dump as batches: every row in one part, in an order that a seed decides, from any place on."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_dumps import small_dump
from torch import Tensor

from lightning_modules.data.activations import ActivationDataModule
from lightning_modules.errors import DataError
from trix.superposition.dump import ActivationDump, manifest, reader, stream_shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_dump(tmp_path_factory.mktemp("dump"), ("resid_pre.1", "ffn_out.1"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_ROWS", 16)
    monkeypatch.setattr(reader, "WINDOW_ROWS", 128)


def make(folders: list[Path], **settings: Any) -> ActivationDataModule:
    return ActivationDataModule(str(folders[0]), **{"batch_size": 100, "validation_fraction": 0.25, **settings})


def rows(parts: Iterable[Sequence[Tensor]]) -> list[list[float]]:
    """Each row, with that of the target behind it where there is one, in an order that does not depend on theirs."""
    return sorted(torch.cat([torch.cat(list(part), dim=1) for part in parts]).tolist())


def test_every_row_is_in_one_part(folders: list[Path]) -> None:
    data = make(folders)
    training, validation = list(data.batches("training", 0)), list(data.val_dataloader())
    everything = torch.cat(list(stream_shards(ActivationDump(folders[0]).paths)))
    assert rows([x] for x, _ in [*training, *validation]) == rows([[everything]])
    assert data.num_features == data.num_outputs == everything.shape[1]
    assert all(x is target for x, target in validation)


def test_no_document_is_in_both_parts(folders: list[Path]) -> None:
    data, dump = make(folders), ActivationDump(folders[0])
    all_rows = [tuple(row) for row in torch.cat(list(stream_shards(dump.paths))).tolist()]
    document = dict(zip(all_rows, dump.column("titleidx").tolist(), strict=True))
    count = Counter(all_rows)  # documents that begin alike have rows in common
    training, validation = (
        {document[tuple(row)] for x, _ in data.batches(part, 0) for row in x.tolist() if count[tuple(row)] == 1}
        for part in ("training", "validation")
    )
    assert training & validation == set()
    assert len(training) > 70
    assert len(validation) > 20


def test_training_serves_whole_batches_in_another_order_each_epoch(folders: list[Path]) -> None:
    data = make(folders)
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == len(second)
    assert all(len(x) == 100 for x, _ in first)
    assert not torch.equal(first[0][0], second[0][0])
    for (ours, _), (again, _) in zip(first, make(folders).train_dataloader(), strict=True):
        assert torch.equal(ours, again)
    assert not torch.equal(first[0][0], next(iter(make(folders, seed=1).train_dataloader()))[0])


def test_any_place_can_be_asked_for_alone(folders: list[Path]) -> None:
    whole = list(make(folders).train_dataloader())
    loader = make(folders).train_dataloader()
    state = loader.state_dict() | {"num_served": 3}
    loader.load_state_dict(state)
    rest = list(loader)
    assert len(rest) == len(whole) - 3
    for (ours, _), (its, _) in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours, its)


def test_targets_are_the_same_tokens_at_another_site(folders: list[Path]) -> None:
    data = make(folders, target=str(folders[1]))
    pairs = rows(zip(*(stream_shards(ActivationDump(path).paths) for path in folders), strict=True))
    assert rows([*data.batches("training", 0), *data.val_dataloader()]) == pairs


def test_bad_values_are_named(folders: list[Path], tmp_path: Path) -> None:
    other = small_dump(tmp_path / "other", ("ffn_out.1",), num_texts=60)[0]
    for settings, message in (
        ({"batch_size": 10**6}, r"batch_size \(1000000\) must be <= training tokens \(\d+\)"),
        ({"batch_size": 0}, r"batch_size \(0\) must be >= 1"),
        ({"validation_fraction": 1e-9}, r"documents of .* held out \(0 of 120, validation_fraction 1e-09\) must be >= 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction"),
        ({"seed": -1}, r"seed \(-1\) must be >= 0"),
        ({"target": str(other)}, r"tokens of target \(.*\) must be those of path"),
    ):
        with pytest.raises(DataError, match=message):
            make(folders, **settings)
    with pytest.raises(DataError, match=r"dump .*nowhere must exist: --data.path DIR says where it is"):
        make([tmp_path / "nowhere"])


def test_a_flipped_bit_is_found_when_the_data_is_made(tmp_path: Path) -> None:
    folder = small_dump(tmp_path)[0]
    shard = ActivationDump(folder).paths[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        DataError, match=r"shard_00001.safetensors: CRC-32 of the file \([0-9a-f]{8}\) must be that of the manifest"
    ):
        make([folder])


def test_a_dump_that_was_changed_is_refused(folders: list[Path], tmp_path: Path) -> None:
    cut = small_dump(tmp_path / "cut")[0]
    shard = ActivationDump(cut).paths[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match="it was cut short"):
        make([cut])
    path = small_dump(tmp_path / "unfinished")[0] / manifest.MANIFEST_FILE
    about = json.loads(path.read_text())
    about |= {"cursor": {"batch": 1, "rows": 0}, "shards": about["shards"][:1], "tokens": 1000}
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="must be complete"):
        make([path.parent])
