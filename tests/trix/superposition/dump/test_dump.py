"""Dumps: every token with its own activations, what is left out and counted, several sites at once."""

from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import numpy as np
import pandas as pd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_backend import LETTERS, PlantedBackend, PlantedWithSinks
from safetensors.torch import load_file
from small_dumps import contents, ragged_frame, trix_backend

from trix.superposition import DumpConfig
from trix.superposition.backends import Site
from trix.superposition.backends.io_store import read_column, shard_paths
from trix.superposition.dump import ActivationDump, dump_layer_activations, dump_sites
from trix.superposition.dump.texts import TokenizedTexts

EXACT = DumpConfig(layer=1, max_len=40, batch_size=16, dtype="fp32", shard_tokens=500, drop_sinks=False)


def acts_of(dump: ActivationDump) -> torch.Tensor:
    return torch.cat([read_column(path, "acts") for path in dump.paths])


def planted(texts: list[str], folder: Path, **changed: object) -> ActivationDump:
    """A dump of texts of the planted backend, in which text d has the label 10 + d."""
    frame = pd.DataFrame({"title": texts, "topic": range(10, 10 + len(texts))})
    cfg = DumpConfig(**{"layer": 1, "dtype": "fp32", **changed})
    dump_layer_activations(frame, "title", "topic", PlantedBackend(), cfg, folder)
    return ActivationDump(folder)


@pytest.mark.parametrize("seed", range(3))
def test_texts_read_together_have_the_activations_of_each_read_alone(seed: int, tmp_path: Path) -> None:
    backend, frame = trix_backend(), ragged_frame(seed=seed)
    dump_layer_activations(frame, "title", "topic", backend, EXACT, tmp_path)
    dump = ActivationDump(tmp_path)
    acts_ND, document_N, position_N = acts_of(dump), dump.column("titleidx"), dump.column("position")
    tile_N, score_N = dump.column("tile"), dump.column("score")
    sites = [Site(1, name) for name in ("resid_pre", "tile", "score")]
    for document, text in enumerate(frame["title"]):
        row_R = (document_N == document).nonzero().flatten()
        assert position_N[row_R].tolist() == list(range(len(text)))
        if not text:
            continue
        alone = backend.activations(**backend.tokenize([text], 40), sites=sites)
        torch.testing.assert_close(acts_ND[row_R], alone[sites[0]][0])
        assert torch.equal(tile_N[row_R], alone[sites[1]][0])
        torch.testing.assert_close(score_N[row_R], alone[sites[2]][0])
    assert len(dump) == frame["title"].str.len().sum()
    assert dump.column("labels").tolist() == [frame["topic"][document] for document in document_N.tolist()]
    places = zip(document_N.tolist(), position_N.tolist(), strict=True)
    letters = [frame["title"][document][position] for document, position in places]
    assert dump.column("tokids").tolist() == [*map(LETTERS.index, letters)]


def test_ten_titles_in_batches_of_four_keep_their_ten_numbers(tmp_path: Path) -> None:
    dump = planted([f"ab{letter}" for letter in "abcdefghjk"], tmp_path, batch_size=4, shard_tokens=7)
    assert sorted(set(dump.column("titleidx").tolist())) == list(range(10))
    assert torch.equal(dump.column("labels"), dump.column("titleidx") + 10)


def test_shards_have_a_fixed_number_of_tokens_and_half_the_bytes(tmp_path: Path) -> None:
    backend, frame = trix_backend(), ragged_frame()
    cfg = EXACT.model_copy(update={"dtype": "bf16"})
    dump_layer_activations(frame, "title", "topic", backend, cfg, tmp_path / "bf16")
    dump_layer_activations(frame, "title", "topic", backend, EXACT, tmp_path / "fp32")
    small, large = ActivationDump(tmp_path / "bf16"), ActivationDump(tmp_path / "fp32")
    *full, last = [shard.tokens for shard in small.manifest.shards]
    assert set(full) == {500}
    assert 0 < last <= 500
    assert sum(full) + last == small.manifest.tokens == len(large)
    assert torch.equal(acts_of(small), acts_of(large).bfloat16())
    shard = load_file(small.paths[0])
    assert {name: column.dtype for name, column in shard.items()} == {
        "acts": torch.bfloat16,
        **dict.fromkeys(("labels", "tokids", "titleidx", "position", "tile"), torch.int64),
        "score": torch.float32,
    }
    assert shard["acts"].nbytes / load_file(large.paths[0])["acts"].nbytes <= 0.55
    assert shard_paths(tmp_path / "bf16", "acts") == small.paths


def test_a_shard_that_holds_all_tokens_takes_the_memory_of_those_that_there_are(tmp_path: Path) -> None:
    cfg = EXACT.model_copy(update={"shard_tokens": 10**13})
    dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), cfg, tmp_path)
    assert len(ActivationDump(tmp_path).paths) == 1


def test_sinks_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    texts = ["sabc", "abst", "", "abcdef", "sss"]
    dump = planted(texts, tmp_path / "filtered")
    kept = ["".join(LETTERS[token] for token in dump.column("tokids")[dump.column("titleidx") == d]) for d in range(5)]
    assert kept == ["abc", "abt", "", "abcdef", ""]
    assert dump.manifest.dropped.model_dump() == {"padding": 7, "first": 0, "not_finite": 0, "norm": 5}
    assert (dump.manifest.documents, dump.manifest.empty_documents) == (5, 1)
    everything = planted(texts, tmp_path / "all", drop_sinks=False)
    assert len(everything) == 17
    assert everything.manifest.dropped.model_dump() == {"padding": 7, "first": 0, "not_finite": 0, "norm": 0}


def test_the_first_position_is_a_sink_where_the_backend_says_so(tmp_path: Path) -> None:
    frame = pd.DataFrame({"title": ["sab", "nbc", "b"], "topic": [0, 1, 0]})
    dump_layer_activations(frame, "title", "topic", PlantedWithSinks(), DumpConfig(layer=0, dtype="fp32"), tmp_path)
    dump = ActivationDump(tmp_path)
    assert dump.column("position").tolist() == [1, 2, 1, 2]
    assert dump.manifest.dropped.model_dump() == {"padding": 2, "first": 3, "not_finite": 0, "norm": 0}


def test_values_that_are_not_finite_are_named_by_shard_and_row(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"left out as NaN or infinite: 3, the first at shard \d, row \d \(document \d, position \d\)"
    ):
        dump = planted(["ana", "bbbi", "ccccn"], tmp_path, batch_size=1, shard_tokens=4)
    assert dump.manifest.dropped.not_finite == 3
    assert acts_of(dump).isfinite().all()
    document_N, position_N = dump.column("titleidx"), dump.column("position")
    for named in dump.manifest.not_finite:
        first = int((document_N == named.document).nonzero()[0])
        rows_before = int(((document_N == named.document) & (position_N < named.position)).sum())
        assert divmod(first + rows_before, 4) == (named.shard, named.row)
    assert {(row.document, row.position) for row in dump.manifest.not_finite} == {(0, 1), (1, 3), (2, 4)}
    with pytest.raises(ValueError, match=r"activations at shard 0, row \d \(document \d, position \d\) must be finite"):
        planted(["ana", "bbbi"], tmp_path / "strict", strict=True)


def test_a_value_beyond_the_stored_type_is_not_finite(tmp_path: Path) -> None:
    backend = PlantedBackend()
    with torch.no_grad():
        backend.model.embedding.weight[0] *= 1e6  # type: ignore[union-attr, operator]
    frame = pd.DataFrame({"title": ["abb"], "topic": [0]})
    for dtype, number in (("fp16", 1), ("bf16", 0)):
        cfg = DumpConfig(layer=0, dtype=dtype, drop_sinks=False)  # type: ignore[arg-type]
        if number:
            with pytest.warns(UserWarning, match="left out as NaN or infinite: 1, "):
                dump_layer_activations(frame, "title", "topic", backend, cfg, tmp_path / dtype)
        else:
            dump_layer_activations(frame, "title", "topic", backend, cfg, tmp_path / dtype)
        assert ActivationDump(tmp_path / dtype).manifest.dropped.not_finite == number


@pytest.mark.parametrize("texts", [["", ""], ["nn", "ni"], []])
def test_a_dump_without_tokens_is_an_error_and_writes_nothing(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"tokens kept \(0 of {len(texts)} texts\) must be >= 1; left out: padding 0, first 0"
    ):
        planted(texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sites_read_at_once_have_rows_of_the_same_tokens(tmp_path: Path) -> None:
    backend, frame = trix_backend(), ragged_frame()
    names = ["resid_pre.0", "resid_mid.1", "router_in.1", Site(2, "ffn_out")]
    folders = dump_sites(frame, "title", "topic", backend, EXACT, names, tmp_path)
    assert [str(site) for site in folders] == [*map(str, names)]
    assert set(folders.values()) == {tmp_path / str(name) for name in names}
    dumps = {str(site): ActivationDump(folder) for site, folder in folders.items()}
    for column in ("labels", "tokids", "titleidx", "position"):
        assert len({tuple(dump.column(column).tolist()) for dump in dumps.values()}) == 1
    assert not torch.equal(dumps["resid_pre.0"].column("tile"), dumps["router_in.1"].column("tile"))
    dump_layer_activations(frame, "title", "topic", backend, EXACT.model_copy(update={"layer": 0}), tmp_path / "alone")
    assert torch.equal(acts_of(ActivationDump(tmp_path / "alone")), acts_of(dumps["resid_pre.0"]))


def test_a_token_left_out_at_one_site_is_left_out_at_all(tmp_path: Path) -> None:
    backend = PlantedBackend()
    handle = backend.block(0).register_forward_hook(lambda _, inputs, output: output * (1 - 2 * (inputs[0] > 0.9)))
    with torch.no_grad():
        backend.model.embedding.weight[0] = float("nan")  # type: ignore[union-attr, index]
    frame = pd.DataFrame({"title": ["abc", "bcs"], "topic": [0, 1]})
    cfg = DumpConfig(dtype="fp32")
    with pytest.warns(UserWarning, match="left out as NaN or infinite: 1, "):
        folders = dump_sites(frame, "title", "topic", backend, cfg, ["resid_pre.0", "negative.0"], tmp_path)
    handle.remove()
    first, second = map(ActivationDump, folders.values())
    assert torch.equal(acts_of(first), -acts_of(second))
    assert first.manifest.dropped == second.manifest.dropped
    assert len(first) == 4


@pytest.mark.parametrize(
    ("sites", "problem"),
    [
        ([], r"sites \(none\) must be >= 1, each once"),
        (["resid_pre.1", "resid_pre.1"], r"sites \(resid_pre.1, resid_pre.1\) must be >= 1, each once"),
        (["tile.1"], r"site \(tile.1\) must be one of resid_pre, resid_mid, router_in, ffn_out"),
        (["resid_pre.3"], r"layer \(3\) must be >= 0 and < number of layers \(3\)"),
    ],
)
def test_wrong_sites_are_refused(sites: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        dump_sites(ragged_frame(), "title", "topic", trix_backend(), EXACT, sites, tmp_path)


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        ({"title": ["a", None], "topic": [0, 1]}, r"title of row 1 \((None|nan)\) must be a str"),
        ({"title": ["a", "b"], "topic": ["X", "Y"]}, r"topic \((object|str)\) must be ints; load_titles_csv numbers names"),
        ({"title": ["a", "b"], "topic": [0.0, float("nan")]}, r"topic \(float64\) must be ints"),
        ({"title": ["a"], "label": [0]}, r"column \('topic'\) must be one of the frame's: title, label"),
    ],
)
def test_frames_without_texts_and_int_labels_are_refused(frame: dict[str, list[object]], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        dump_layer_activations(pd.DataFrame(frame), "title", "topic", PlantedBackend(), DumpConfig(layer=0), tmp_path)


def test_progress_is_shown_on_a_terminal_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), EXACT, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), EXACT, tmp_path / "shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert "activations" in err
    assert "100%" in err
    assert "0:00:00" in err


def test_the_same_dump_has_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        dump_layer_activations(ragged_frame(), "title", "topic", trix_backend(), EXACT, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=40), batch_size=st.integers(1, 9))
def test_batches_hold_each_text_once_and_little_padding(lengths: list[int], batch_size: int) -> None:
    start = np.cumsum([0, *lengths])
    texts = TokenizedTexts(np.arange(start[-1], dtype=np.int32), start, np.zeros(len(lengths), dtype=np.int64))
    batches = texts.batches(batch_size)
    assert sorted(int(d) for batch in batches for d in batch) == [d for d, length in enumerate(lengths) if length]
    assert all(len(batch) <= batch_size for batch in batches)
    spans = sorted((min(lengths[d] for d in batch), max(lengths[d] for d in batch)) for batch in batches)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))
    for document in batches:
        batch = texts.batch(document)
        for row, d in enumerate(document):
            assert batch.id_BT[row][batch.is_token_BT[row]].tolist() == list(range(start[d], start[d + 1]))
