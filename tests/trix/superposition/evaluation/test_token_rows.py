"""The rows of a dump in order: each once, in the part where training has it, with its columns."""

from pathlib import Path

import pytest
import torch
from small_dumps import small_dump

from trix.superposition.dump import ActivationDump, reader
from trix.superposition.evaluation.token_rows import TokenRows, read_rows


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> list[ActivationDump]:
    folders = small_dump(tmp_path_factory.mktemp("dump"), ("resid_pre.1", "ffn_out.1"))
    return [ActivationDump(folder) for folder in folders]


def test_all_rows_are_those_of_the_columns_in_order(dumps: list[ActivationDump]) -> None:
    rows = TokenRows.joined(read_rows(dumps[0]))
    assert torch.equal(rows.x_ND, torch.cat(list(reader.stream_shards(dumps[0].paths))))
    assert rows.target_NO is rows.x_ND or torch.equal(rows.target_NO, rows.x_ND)
    for name, column in (("tokids", rows.token_N), ("titleidx", rows.document_N), ("position", rows.position_N)):
        assert torch.equal(column, dumps[0].column(name))
    assert torch.equal(rows.label_N, dumps[0].column("labels"))


def test_parts_are_those_of_training(dumps: list[ActivationDump]) -> None:
    for part in ("training", "validation"):
        rows = TokenRows.joined(read_rows(dumps[0], None, part, 0.3, 5))
        shuffled = next(dumps[0].shuffled(10_000, 5, columns=("acts", "tokids"), part=part, held_out=0.3))
        assert len(rows.x_ND) == dumps[0].num_rows(part, 0.3, 5) > 0
        assert torch.equal(rows.x_ND.sort(dim=0).values, shuffled["acts"].sort(dim=0).values)
        assert torch.equal(rows.token_N.sort().values, shuffled["tokids"].sort().values)


def test_the_target_is_of_the_same_tokens(dumps: list[ActivationDump]) -> None:
    rows = TokenRows.joined(read_rows(dumps[0], dumps[1], "validation", 0.3, 5))
    expected = TokenRows.joined(read_rows(dumps[1], None, "validation", 0.3, 5))
    assert torch.equal(rows.target_NO, expected.x_ND)
    assert not torch.equal(rows.x_ND, rows.target_NO)
    assert torch.equal(rows.document_N, expected.document_N)


def test_a_limit_keeps_whole_chunks_from_everywhere(dumps: list[ActivationDump]) -> None:
    whole, part = (TokenRows.joined(read_rows(dumps[0], max_tokens=limit)) for limit in (None, 1000))
    assert 500 < len(part.x_ND) <= 1000
    assert torch.equal(part.x_ND[0], whole.x_ND[0])
    assert torch.equal(part.x_ND[-1], whole.x_ND[-1])
    places = [set(zip(rows.document_N.tolist(), rows.position_N.tolist(), strict=True)) for rows in (part, whole)]
    assert places[0] < places[1]
    assert len(places[0]) == len(part.x_ND)


def test_the_folder_is_a_folder(dumps: list[ActivationDump]) -> None:
    assert isinstance(dumps[0].folder, Path)
    with pytest.raises(ValueError, match=r"held_out \(1.0\) must be >= 0 and < 1"):
        next(read_rows(dumps[0], None, "training", 1.0))
