"""The page about the latents of an autoencoder: what it shows, that it is one closed file, and how long it can be."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from planted_sae import identity_sae, write_shards
from torch import Tensor

from trix.superposition.analysis.survey import Survey, survey_latents
from trix.superposition.viz import dashboard as module
from trix.superposition.viz.dashboard import Vocabulary, dashboard

pytest.importorskip("pydantic", reason="shards are read by trix.superposition.backends, whose settings need pydantic")

TEXTS = ["<script>alert(1)</script>", "&amp;", '"', " ", "\n", "a", "日", "x" * 100]
VOID = ("meta", "input")


class Page(HTMLParser):
    """Every opened element is closed, in order. cards: text of each by its id. marks: text and activation of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.cards: dict[str, str] = {}
        self.marks: dict[str, list[tuple[str, float, bool]]] = {}
        self.card = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert "src" not in given
        assert not any(name.startswith("on") for name in given)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.card = given["id"]
            self.cards[self.card], self.marks[self.card] = "", []
        if tag == "script":
            self.scripts.append("")
        if tag == "mark":
            self.marks[self.card].append(("", float(given["title"]), given.get("class") == "own"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.card = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.card:
            self.cards[self.card] += data
            if self.open[-1] == "mark":
                text, *rest = self.marks[self.card][-1]
                self.marks[self.card][-1] = (text + data, *rest)  # type: ignore[assignment]


def surveyed(folder: Path, acts_ND: Tensor, latents: list[int], **columns: Tensor) -> Survey:
    paths = write_shards(folder, acts_ND, [len(acts_ND)], **columns)
    return survey_latents(identity_sae(acts_ND.shape[1]), paths, latents, "cpu", has_tiles="tile" in columns)


def vocabulary(head_VO: Tensor | None = None) -> Vocabulary:
    unembed = None if head_VO is None else lambda x_NO: x_NO @ head_VO.t()
    return Vocabulary(lambda ids: [TEXTS[idx] for idx in ids], len(TEXTS), unembed)


@pytest.fixture
def acts_ND() -> Tensor:  # noqa: N802 (shape suffix)
    """Latent 0 fires on each token, the stronger the later; latent 1 never; latent 2 on every other token."""
    return torch.tensor([[row + 1.0, -1.0, row % 2] for row in range(len(TEXTS))])


def test_what_is_known_of_a_latent_is_on_its_card(acts_ND: Tensor, tmp_path: Path) -> None:
    tile_N = torch.tensor([0, 0, 0, 0, 0, 0, 3, 3])
    survey = surveyed(tmp_path, acts_ND, [0, 2], tile=tile_N)
    head_VO = torch.randn(len(TEXTS), 3, generator=torch.Generator().manual_seed(0))
    row_KO = torch.eye(3)
    page = Page(dashboard("Latents", [("site", "resid_pre.1")], survey, row_KO, vocabulary(head_VO)))
    assert list(page.cards) == ["l0", "l2"]
    card = page.cards["l2"]
    assert "Fires on 50 % of the tokens (4); 10 % of the mass; largest activation 1." in card
    assert page.marks["l2"] == [("&amp;", 1, True), ("␣", 1, False), ("a", 1, False), ("x" * 40 + "…", 1, False)]
    logit_V = head_VO[:, 2] * 3**0.5
    best, worst = int(logit_V.argmax()), int(logit_V.argmin())
    assert f"Largest logits{shown(TEXTS[best])} {logit_V[best]:+.3g}" in card
    assert f"Smallest logits{shown(TEXTS[worst])} {logit_V[worst]:+.3g}" in card
    assert "tile 0: 75 %, lift 1" in card
    assert "tile 3: 25 %, lift 1" in card
    assert [value for _, value, _ in page.marks["l0"]] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert [is_own for *_, is_own in page.marks["l0"]] == [False] * 7 + [True]


def shown(text: str) -> str:
    text = text if len(text) <= 40 else text[:40] + "…"
    return text.replace(" ", "␣").replace("\n", "⏎")


def test_the_page_is_closed_and_all_text_is_escaped(acts_ND: Tensor, tmp_path: Path) -> None:
    facts = [("<b>name</b>", "<i>&value")]
    text = dashboard("A & <B>", facts, surveyed(tmp_path, acts_ND, [0, 1, 2]), torch.eye(3), vocabulary(torch.ones(8, 3)), "x")
    page = Page(text)
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert page.policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert re.search(r"https?:|url\(|@import|<link|<iframe", text) is None
    assert re.findall(r"--mark: ([\d ]+\d)", text) == ["224 130 20", "156 74 0"]  # the last one holds, and only in the dark
    assert "<script>alert(1)</script>" in page.cards["l0"]
    for escaped in ("<title>A &amp; &lt;B&gt;</title>", "&lt;b&gt;name", "&lt;i&gt;&amp;value"):
        assert escaped in text
    assert len(set(page.ids)) == len(page.ids)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_a_dead_latent_is_called_dead(acts_ND: Tensor, tmp_path: Path) -> None:
    page = Page(dashboard("Latents", [], surveyed(tmp_path, acts_ND, [1]), torch.eye(3), vocabulary(torch.eye(8)[:, :3])))
    assert "Dead: it fires at none of 8 tokens." in page.cards["l1"]
    assert page.marks == {"l1": []}
    silent = surveyed(tmp_path, -acts_ND.abs(), [0, 1, 2])
    assert "3 of 3 latents never fire" in dashboard("Latents", [], silent, torch.eye(3), vocabulary())


def test_without_a_way_to_the_stream_there_are_no_logits(acts_ND: Tensor, tmp_path: Path) -> None:
    text = dashboard("Latents", [], surveyed(tmp_path, acts_ND, [0]), torch.eye(3), vocabulary())
    assert "There are no logits, as the decoder does not write into the residual stream." in text
    assert "Largest logits" not in text


def test_latents_that_are_not_shown_have_no_link(acts_ND: Tensor, tmp_path: Path) -> None:
    row_KO = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    page = Page(dashboard("Latents", [], surveyed(tmp_path, acts_ND, [0, 2]), row_KO, vocabulary()))
    assert "by cosine1 +1.002 +0.00" in page.cards["l0"]
    assert set(page.links) == {"#l0", "#l2", "#cards", "#list"}


@pytest.mark.parametrize("room", [25_000, 60_000])
def test_examples_are_left_out_of_the_largest_cards_until_all_fit(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    acts_ND = torch.rand(3000, 8, generator=generator) * (torch.rand(3000, 8, generator=generator) < torch.arange(1, 9) / 8)
    survey = surveyed(tmp_path, acts_ND, list(range(8)), tokids_N=torch.full((3000,), 5))
    whole = dashboard("Latents", [], survey, torch.eye(8), vocabulary())
    monkeypatch.setattr(module, "MAX_BYTES", room)
    text = dashboard("Latents", [], survey, torch.eye(8), vocabulary())
    assert "would make the page too long" not in whole
    cards = [len(card.encode()) for card in re.findall(r"<section.*?</section>", text, re.DOTALL)]
    full = [len(card.encode()) for card in re.findall(r"<section.*?</section>", whole, re.DOTALL)]
    assert sum(full) > room >= sum(cards)
    cut = [index for index in range(8) if cards[index] < full[index]]
    assert min(full[index] for index in cut) >= max(cards)
    assert text.count("would make the page too long") == len(cut)


def test_more_latents_than_a_page_holds_are_refused(acts_ND: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = surveyed(tmp_path, acts_ND, [0, 1, 2])
    monkeypatch.setattr(module, "MAX_LATENTS", 2)
    with pytest.raises(ValueError, match=r"number of latents on a page \(3\) must be <= 2"):
        dashboard("Latents", [], survey, torch.eye(3), vocabulary())
