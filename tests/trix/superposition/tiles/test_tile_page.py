"""The report of a dump, its record, and its page."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_sae import ReLUSAE
from small_dumps import VOCABULARY, ragged_frame, small_dump, trix_backend

from trix.superposition.config import DumpConfig
from trix.superposition.dump import ActivationDump, dump_sites
from trix.superposition.tiles import read_traffic
from trix.superposition.tiles.page import summary_rows, tile_page, tile_record
from trix.superposition.tiles.report import TileReport, tile_report

HOSTILE = "<&\"'>" + VOCABULARY[5:]


def sae() -> ReLUSAE:
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(40, 32), dim=-1)
    return ReLUSAE(weight.T, weight, torch.full((40,), -1.0))


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> ActivationDump:
    (folder,) = small_dump(tmp_path_factory.mktemp("dump"), ("router_in.1",))
    return ActivationDump(folder)


@pytest.fixture(scope="module")
def report(dump: ActivationDump) -> TileReport:
    return tile_report(trix_backend(), sae(), dump)


class Page(HTMLParser):
    """The texts of a page whose elements are all closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """<path/> closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_readings_are_counts_of_the_dump(dump: ActivationDump, report: TileReport) -> None:
    tile_N, token_N = dump.column("tile").numpy(), dump.column("tokids").numpy()
    assert report.num_tokens == len(dump)
    for reading in report.readings:
        own = token_N[tile_N == reading.tile]
        assert reading.share == pytest.approx(len(own) / len(dump))
        counts = np.bincount(own, minlength=27)
        assert [token.share for token in reading.tokens] == pytest.approx(
            sorted(counts / len(own))[::-1][: len(reading.tokens)]
        )
        for token in reading.tokens:
            assert counts[token.token] / len(own) == pytest.approx(token.share)
            assert counts[token.token] / (token_N == token.token).sum() == pytest.approx(token.claimed)
        signature = trix_backend().block(1).ffn.get_tile_signatures()[reading.tile]
        assert reading.plus == (signature > 0).nonzero().flatten().tolist()
        assert reading.minus == (signature < 0).nonzero().flatten().tolist()
    assert any(reading.latents for reading in report.readings)


def test_passages_are_of_the_tile_and_of_different_documents(dump: ActivationDump, report: TileReport) -> None:
    tile_N, token_N, title_N = (dump.column(name).numpy() for name in ("tile", "tokids", "titleidx"))
    documents = {title: token_N[title_N == title].tolist() for title in np.unique(title_N)}
    num_passages = 0
    for reading in report.readings:
        found = []
        for passage in reading.passages:
            piece, place = [*passage.before, passage.token, *passage.after], len(passage.before)
            of_piece = [
                (title, start + place)
                for title, tokens in documents.items()
                for start in range(len(tokens) - len(piece) + 1)
                if tokens[start : start + len(piece)] == piece
                and (start == 0 or place == 24)
                and (start + len(piece) == len(tokens) or len(passage.after) == 12)
            ]
            assert any(tile_N[title_N == title][at] == reading.tile for title, at in of_piece)
            found += of_piece[:1]
        assert len({title for title, _ in found}) == len(reading.passages)
        num_passages += len(found)
    assert num_passages >= 4


def test_the_page_shows_each_tile_and_escapes_how_tokens_are_written(report: TileReport) -> None:
    page = tile_page(report, HOSTILE, {"model": "<script>alert(1)</script>"})
    shown = Page(page)
    assert page.count('<div class="tile">') == 8
    assert "script" not in shown.tags
    assert "<script>alert(1)</script>" in shown.texts
    tokens = {token.token for reading in report.readings for token in reading.tokens}
    assert 0 in tokens
    assert {HOSTILE[token] for token in tokens if HOSTILE[token] != " "} <= set(shown.texts)
    for row in summary_rows(report):
        assert row[1] in shown.texts


def test_the_record_is_json_with_null_for_what_is_not_finite(report: TileReport) -> None:
    record = tile_record(report, {"seed": 0, "note": float("nan")})
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert record["provenance"] == {"seed": 0, "note": None}
    assert record["contingency"]["discoveries"] == int(report.found.is_discovery_KE.sum())
    assert report.causal is not None
    assert record["causal"]["changed"] == pytest.approx(report.causal.changed)
    assert [tile["tile"] for tile in record["tiles"]] == list(range(8))
    assert report.insertion is not None
    assert record["insertion"]["steering"]["kl"] == report.insertion.steering.kl


def test_fewer_tokens_are_whole_documents(dump: ActivationDump) -> None:
    found = tile_report(trix_backend(), sae(), dump, num_tokens=500)
    length_P = np.bincount(dump.column("titleidx").numpy())
    assert 500 - length_P.max() < found.num_tokens <= 500
    with pytest.raises(ValueError, match=r"num_tokens \(0\) must be >= 1"):
        tile_report(trix_backend(), sae(), dump, num_tokens=0)


def test_hidden_states_that_depend_on_the_token_alone_are_said_to(report: TileReport, tmp_path: Path) -> None:
    assert not report.is_by_token_alone
    assert not any("token alone" in note for note in report.notes)
    config = DumpConfig(layer=0, max_len=1)  # nothing stands before the only token of a text
    (folder,) = dump_sites(ragged_frame(), "title", "topic", trix_backend(), config, ["router_in.1"], tmp_path).values()
    found = tile_report(trix_backend(), sae(), ActivationDump(folder))
    assert found.decided == "hidden"
    assert found.is_by_token_alone
    assert sum(note.startswith("routed by the token alone") for note in found.notes) == 1


def test_a_single_tile_is_no_routing_by_the_token(tmp_path: Path) -> None:
    backend = trix_backend(num_tiles=1)
    config = DumpConfig(layer=0, max_len=40)
    (folder,) = dump_sites(ragged_frame(20), "title", "topic", backend, config, ["router_in.1"], tmp_path).values()
    found = tile_report(backend, sae(), ActivationDump(folder))
    assert (found.tile_bits, found.given_token_bits, found.is_by_token_alone) == (0, 0, False)
    assert found.notes == ["all tokens go to one tile: there is no choice for latents to explain"]


def test_tokens_that_come_once_are_no_routing_by_the_token(dump: ActivationDump, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_traffic(sae(), dump, 8, 300)
    every = replace(read, token_N=np.arange(read.num_tokens))
    monkeypatch.setattr("trix.superposition.tiles.report.read_traffic", lambda *_: every)
    monkeypatch.setattr("trix.superposition.tiles.report._batches", lambda _: [])
    found = tile_report(trix_backend(), sae(), dump)
    assert found.given_token_bits == found.permuted_bits == 0 < found.tile_bits
    assert not found.is_by_token_alone
    assert not any("token alone" in note for note in found.notes)


def test_an_insertion_that_cannot_be_compared_leaves_the_rest(
    dump: ActivationDump, report: TileReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("KL at the largest scale must be >= that of the insertion")

    monkeypatch.setattr("trix.superposition.tiles.report.insertion_against_steering", fail)
    found = tile_report(trix_backend(), sae(), dump)
    assert found.insertion is None
    assert found.notes[-1].endswith("could not be compared: KL at the largest scale must be >= that of the insertion")
    assert found.probe == report.probe
    assert json.dumps(tile_record(found, {}), allow_nan=False)
    assert '<div class="tile">' in tile_page(found, VOCABULARY, {})


@pytest.mark.parametrize(
    ("ffn", "site", "note"),
    [
        ({"routing": "learned"}, "router_in.1", "alignment and insertion need signatures: LearnedRouter has none"),
        ({"kind": "sparse_lookup"}, "router_in.1", "insertion is defined for TriXFFN, not for SparseLookupFFN"),
        ({}, "ffn_out.1", "the causal check is defined at router_in and resid_pre, not at ffn_out"),
        ({"routing": "hash"}, "router_in.1", "routed by the token alone"),
    ],
)
def test_what_is_not_defined_is_none_and_a_note_says_why(ffn: dict[str, object], site: str, note: str, tmp_path: Path) -> None:
    backend = trix_backend(**ffn)
    config = DumpConfig(layer=0, max_len=40)
    (folder,) = dump_sites(ragged_frame(60), "title", "topic", backend, config, [site], tmp_path).values()
    found = tile_report(backend, sae(), ActivationDump(folder))
    assert sum(one.startswith(note) for one in found.notes) == 1
    assert found.insertion is None
    assert (found.alignment is None) == ("kind" not in ffn)
    assert (found.causal is None) == (site != "router_in.1" or ffn == {"routing": "hash"})
    assert '<div class="tile">' in tile_page(found, VOCABULARY, {})


def test_a_dump_without_tiles_is_refused(tmp_path: Path) -> None:
    backend = trix_backend(kind="dense", num_tiles=16, route_on="embedding")
    (folder,) = dump_sites(
        ragged_frame(10), "title", "topic", backend, DumpConfig(layer=0, max_len=40), ["resid_pre.1"], tmp_path
    ).values()
    with pytest.raises(ValueError, match=r"feed-forward layer \(DenseFFN\) must have tiles"):
        tile_report(backend, sae(), ActivationDump(folder))
