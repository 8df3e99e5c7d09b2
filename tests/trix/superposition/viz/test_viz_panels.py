import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_sae import identity_sae, write_shards
from torch import Tensor

from trix.superposition.viz import panels, top_activations_panel

pytest.importorskip("pydantic", reason="shards are read by trix.superposition.backends, whose settings need pydantic")

TEXTS = ["<script>", "&amp;", '"', " ", "\n", "a", "日", "\x1b"]


class Shown(NamedTuple):
    """A document of a panel. marks: text, opacity and activation of each token with a background."""

    head: str
    text: str
    marks: list[tuple[str, float, float]]


class Panel(HTMLParser):
    """What a panel shows, read from the page; every opened element is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[Shown] = []
        self.place, self.tags = "", set[str]()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = {name: value or "" for name, value in attrs}
        assert {"src", "href", "onclick"}.isdisjoint(given)
        if tag == "meta":
            return
        self.open.append(tag)
        kind = given.get("class", "")
        if kind == "tile":
            self.shown.append(Shown("", "", []))
            self.place = "head"
        elif kind == "passage":
            self.place = "text"
        elif tag == "mark":
            colour = re.fullmatch(r"--a:([0-9.e-]+)", given["style"])
            assert colour is not None
            self.shown[-1].marks.append(("", float(colour[1]), float(given["title"])))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("p", "div"):
            self.place = ""

    def handle_data(self, data: str) -> None:
        if not self.place:
            return
        last = self.shown[-1]
        if self.open[-1] == "mark":
            text, *rest = last.marks[-1]
            last.marks[-1] = (text + data, *rest)  # type: ignore[assignment]
        self.shown[-1] = last._replace(**{self.place: getattr(last, self.place) + data})


def documents(page: str) -> list[int]:
    return [int(re.findall(r"document (\d+)", shown.head)[0]) for shown in Panel(page).shown]


def numbered(ids: list[int]) -> list[str]:
    return [f"{idx}." for idx in ids]


def write(folder: Path, values: list[float], titles: list[int], ids: list[int] | None = None) -> list[Path]:
    """One shard, whose latent 1 has the values; latent 0 never fires."""
    acts_ND = torch.stack([torch.full((len(values),), -1.0), torch.tensor(values)], dim=1)
    return write_shards(
        folder, acts_ND, [len(values)], None if ids is None else torch.tensor(ids), torch.tensor(titles, dtype=torch.int64)
    )


def expected(value_N: Tensor, title_N: Tensor, top: int, width: int) -> list[tuple[int, str]]:
    """Number and text of each document that is shown, by the definition."""
    rows = list(range(len(value_N)))
    strongest = {}
    for title in set(title_N.tolist()):
        row = max((row for row in rows if title_N[row] == title), key=lambda row: (float(value_N[row]), -row))
        if value_N[row] > 0:
            strongest[title] = row
    ranked = sorted(strongest, key=lambda title: (-float(value_N[strongest[title]]), title))[:top]
    found = []
    for title in ranked:
        low = high = strongest[title]
        while low > 0 and title_N[low - 1] == title:
            low -= 1
        while high < len(rows) and title_N[high] == title:
            high += 1
        first = max(low, min(strongest[title] - width // 2, high - width))
        stop = min(high, first + width)
        before, after = "…" * (first > low), "…" * (stop < high)
        found.append((title, before + "".join(numbered(rows[first:stop])) + after))
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    is_split=st.booleans(),
    num_shards=st.integers(1, 4),
    batch=st.integers(1, 20),
    top=st.integers(1, 5),
    width=st.integers(1, 9),
)
def test_the_strongest_documents_whatever_the_shards_and_batches(
    seed: int, lengths: list[int], is_split: bool, num_shards: int, batch: int, top: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if is_split:
        order += order[::-1]  # each document lies at two places
    title_N = torch.tensor([title for title in order for _ in range(lengths[title])])
    # So few different values that many are equal.
    value_N = torch.randint(-3, 4, title_N.shape, generator=generator).clamp(min=0).float()
    cuts = torch.randint(0, len(title_N) + 1, (num_shards - 1,), generator=generator).sort().values.tolist()
    sizes = np.diff([0, *cuts, len(title_N)]).tolist()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "BATCH_TOKENS", batch)
        paths = write_shards(Path(folder), value_N[:, None], sizes, titleidx_N=title_N)
        page = top_activations_panel(0, paths, paths, identity_sae(1), numbered, "cpu", top, width)
    assert list(zip(documents(page), (shown.text for shown in Panel(page).shown), strict=True)) == expected(
        value_N, title_N, top, width
    )


def test_the_background_is_as_strong_as_the_activation(tmp_path: Path) -> None:
    paths = write(tmp_path, [0.0, 2.0, 0.5, 4.0, 1.0], titles=[7, 7, 7, 3, 3])
    page = top_activations_panel(1, paths, paths, identity_sae(2), numbered, "cpu")
    first, second = Panel(page).shown
    assert (first.head, second.head) == ("document 3, largest activation 4", "document 7, largest activation 2")
    assert first.marks == [("3.", 1.0, 4.0), ("4.", pytest.approx(0.25, abs=1 / 255), 1.0)]
    assert second.marks == [("1.", pytest.approx(0.5, abs=1 / 255), 2.0), ("2.", pytest.approx(0.125, abs=1 / 255), 0.5)]
    assert second.text == "0.1.2."
    assert "<dt>measured on</dt><dd>5 tokens</dd>" in page
    assert "<dt>active at</dt><dd>4 tokens (80.00%)</dd>" in page
    raised = top_activations_panel(1, paths, paths, identity_sae(2), numbered, "cpu", min_alpha=0.6)
    opacities = [opacity for shown in Panel(raised).shown for _, opacity, _ in shown.marks]
    assert opacities == pytest.approx([1.0, 0.7, 0.8, 0.65], abs=1 / 255)


def test_the_text_is_escaped_and_what_has_no_shape_is_visible(tmp_path: Path) -> None:
    ids = [*range(len(TEXTS)), 3]
    paths = write(tmp_path, [1.0] * len(TEXTS) + [0.0], titles=[0] * len(ids), ids=ids)
    page = top_activations_panel(1, paths, paths, identity_sae(2), lambda ids: [TEXTS[idx] for idx in ids], "cpu")
    panel = Panel(page)
    assert [text for text, _, _ in panel.shown[0].marks] == ["<script>", "&amp;", '"', "␣", "⏎", "a", "日", "␛"]
    assert panel.shown[0].text.endswith("␛ ")  # a space without a background stays one
    assert "script" not in panel.tags
    assert "<script" not in page
    assert page.startswith("<!doctype html>")


def test_a_latent_that_never_fires_has_a_page_that_says_so(tmp_path: Path) -> None:
    paths = write(tmp_path, [1.0, 2.0], titles=[0, 1])
    page = top_activations_panel(0, paths, paths, identity_sae(2), numbered, "cpu")
    assert "it never fires" in page
    assert "2 tokens" in page
    assert Panel(page).shown == []


def test_npy_files_of_the_interface_are_read_too(tmp_path: Path) -> None:
    columns = {"acts": np.array([[1.0], [3.0]], np.float32), "tokids": np.array([1, 0]), "titleidx": np.array([4, 5])}
    for name, column in columns.items():
        np.save(tmp_path / f"shard_00000_{name}.npy", column)
    act_files, tok_files = ([tmp_path / f"shard_00000_{name}.npy"] for name in ("acts", "tokids"))
    shown = Panel(top_activations_panel(0, act_files, tok_files, identity_sae(1), "xy", "cpu")).shown
    assert [(found.head[:10], found.text) for found in shown] == [("document 5", "x"), ("document 4", "y")]


def test_errors(tmp_path: Path) -> None:
    sae = identity_sae(2)
    paths = write(tmp_path, [1.0, 2.0], titles=[0, 1])

    def panel(latent: int = 1, tokenizer: object = numbered, **changed: object) -> str:
        given: dict[str, object] = {"act_files": paths, "tok_files": paths, "device": "cpu"} | changed
        return top_activations_panel(latent, sae=sae, tokenizer=tokenizer, **given)  # type: ignore[arg-type]

    for latent in (-1, 2):
        with pytest.raises(ValueError, match=rf"latent_j \({latent}\) must be >= 0 and < k \(2\)"):
            panel(latent)
    with pytest.raises(ValueError, match=r"top_titles \(0\) and max_tokens_per_title \(64\) must be >= 1"):
        panel(top_titles=0)
    with pytest.raises(ValueError, match=r"min_alpha \(1.5\) must be >= 0 and <= 1"):
        panel(min_alpha=1.5)
    with pytest.raises(ValueError, match=r"tok_files \(0\) must be as many as act_files \(1\)"):
        panel(tok_files=[])
    with pytest.raises(ValueError, match=r"act_files \(0 files with 0 tokens\) must hold at least 1 token"):
        panel(act_files=[], tok_files=[])
    with pytest.raises(ValueError, match=r"token id \(1\) must be >= 0 and < size of the vocabulary \(1\)"):
        panel(tokenizer="x")
    (tmp_path / "more").mkdir()
    halves = write_shards(tmp_path / "more", torch.ones(2, 2), [2], tokids_N=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"tokids \(float32 \(2,\)\) must be int \[N\]"):
        panel(tok_files=halves)
    longer = write(tmp_path / "more", [1.0, 2.0, 3.0], titles=[0, 0, 0])
    with pytest.raises(ValueError, match=r"tokids \(3 tokens\) must be of as many tokens as .* \(2\)"):
        panel(tok_files=longer)
    broken = write(tmp_path / "more", [1.0, float("nan")], titles=[0, 0])
    with pytest.raises(ValueError, match="latents must be finite"):
        panel(act_files=broken, tok_files=broken)
