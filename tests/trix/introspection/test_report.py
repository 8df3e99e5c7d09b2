import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from trix.evolution import merge_tiles, raise_k, split_tile
from trix.introspection import html_report
from trix.introspection.ngrams import CountedText, NgramReader, count_ngrams
from trix.nn import Classifier, ClassifierConfig, FFNConfig, LanguageModel, LanguageModelConfig, SparseLookupFFNv2

TEXT = "<b>&\n $\\日\x0c"
TOKENS = torch.randint(0, len(TEXT), (3, 12), generator=torch.Generator().manual_seed(0))
STRINGS = [[TEXT[token] for token in sequence] for sequence in TOKENS.tolist()]
IMAGES = torch.rand(20, 6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(20) % 3


def network(**ffn: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        len(TEXT), LanguageModelConfig(16, 2, 2, 12, ffn=FFNConfig(**({"num_tiles": 3, "top_k": 1} | ffn)))
    ).eval()


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(5, 3, ClassifierConfig(16, 1, 2, context_length=6, ffn=FFNConfig(num_tiles=4, top_k=1))).eval()


class Page(HTMLParser):
    """Every opened element is closed, in order; what stands in headings, and in the muted paragraphs that follow them."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("h2", "h3"):
            self.headings.append([])
        elif self.headings and tag == "p" and ("class", "muted") in attrs and len(self.headings[-1]) == 1:
            self.headings[-1].append("")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """<rect/> closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1].append(data)
        elif self.headings and len(self.headings[-1]) == 2 and not self.headings[-1][1]:
            self.headings[-1][1] = data


def cards(page: str) -> list[str]:
    return page.split('<div class="tile">')[1:]


@pytest.mark.usefixtures("drawn_figures")
def test_the_page_is_whole_self_contained_and_escapes_the_text() -> None:
    model = network()
    model.stack.blocks[0].ffn.freeze_signature(1, tag="<i>why</i>")
    page = html_report(model, TOKENS, STRINGS, title="<em>", facts={"data": "<u>"})
    Page(page)
    for markup in ("<em>", "<b>", "<u>", "<i>"):
        assert markup not in page
    assert not re.search(r"(src|href)=\"(?!data:|#layer)", page)
    assert page.count('<div class="tile">') == 2 * 3
    assert page.count('<span class="badge">frozen</span>') == 1
    assert page.count("<img") == 2 * 5
    assert "\x0c" not in page


@pytest.mark.usefixtures("drawn_figures")
def test_every_heading_is_explained() -> None:
    for page in (html_report(network(), TOKENS, STRINGS), html_report(classifier(), IMAGES, labels=LABELS)):
        headings = Page(page).headings
        assert len(headings) > 8
        assert all(len(parts) == 2 and len(parts[1]) > 20 for parts in headings), headings
        explained = set(re.findall(r"<dt>(.*?)</dt>", page))
        assert set(re.findall(r"<th>(.*?)</th>", page.split("</tr>")[0])) <= explained


def test_the_model_runs_once_on_each_sequence_and_is_left_as_it_was() -> None:
    model = network().train()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    html_report(model, TOKENS, STRINGS)
    assert sum(sizes) == len(TOKENS)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_progress_is_handed_on() -> None:
    seen: list[tuple[str, int]] = []

    def track(steps: Sequence[Any], description: str) -> Iterable[Any]:
        seen.append((description, len(steps)))
        return steps

    html_report(network(), TOKENS, STRINGS, track=track)
    assert seen == [("running the model", 1), ("drawing the layers", 2)]


def test_claims_are_those_of_the_routing() -> None:
    model = classifier()
    _, (info,), _ = model(IMAGES, return_routing=True)
    tile_BT = info["tile_idx"].squeeze(-1)
    for tile, card in enumerate(cards(html_report(model, IMAGES, labels=LABELS, class_names=["ay", "bee", "cee"]))):
        count = Counter(LABELS.unsqueeze(1).expand_as(tile_BT)[tile_BT == tile].tolist())
        if not count:
            assert "No token landed here" in card
            continue
        rows = re.findall(r"<tr><td><code>(\w+)</code></td><td>(\d+)%</td><td>(\d+)%</td></tr>", card)
        assert {name for name, _, _ in rows} == {("ay", "bee", "cee")[c] for c in count}
        for name, of_tile, of_class in rows:
            c = ("ay", "bee", "cee").index(name)
            assert float(of_tile) == pytest.approx(100 * count[c] / count.total(), abs=0.51)
            assert float(of_class) == pytest.approx(100 * count[c] / int((LABELS == c).sum() * 6), abs=0.51)
        assert f"purity: {max(count.values()) / count.total():.0%}" in card
        assert f"usage: {count.total() / 120:.1%}" in card


def test_under_a_hash_each_token_is_claimed_whole() -> None:
    page = html_report(network(routing="hash", num_tiles=2), TOKENS, STRINGS)
    claims = re.findall(r"<tr><td><code>.*?</code></td><td>\d+%</td><td>(\d+)%</td></tr>", page)
    assert set(claims) == {"100"}
    assert "A hash of the token&#x27;s id chooses the tile" in page


def test_examples_are_marked_where_they_stand() -> None:
    strings = [list("the quick fo"), list("x jumps over"), list("a lazy dog.\n")]
    contexts = re.findall(r'<div class="context">(.*?)<mark>(.*?)</mark>(.*?)</div>', html_report(network(), TOKENS, strings))
    assert contexts
    shown = ["".join(sequence).replace("\n", "⏎") for sequence in strings]
    for before, marked, after in contexts:
        assert len(before) == 20
        assert any(line.startswith(before.lstrip() + marked.replace("␣", " ") + after) for line in shown)
    assert html_report(classifier(), IMAGES, labels=LABELS).count('class="picture"') > 4


def test_nearest_tiles_are_named_most_alike_first() -> None:
    model = network(num_tiles=5)
    ffn = model.stack.blocks[0].ffn
    signature = ffn.get_tile_signatures()
    unit = signature / signature.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    order = [tile for tile in similarity[0].argsort(descending=True).tolist() if tile != 0][:3]
    expected = ", ".join(f"{tile} ({float(similarity[0, tile]):.2f})" for tile in order)
    assert f"nearest tiles: {expected}<" in cards(html_report(model, TOKENS, STRINGS))[0]


def test_surgery_is_told() -> None:
    model = network()
    assert "None: all signatures are as training made them" in html_report(model, TOKENS, STRINGS)
    model.stack.blocks[1].ffn.insert_signature(2, torch.ones(16), tag="ones")
    page = html_report(model, TOKENS, STRINGS)
    assert "<tr><td>0</td><td>1</td><td>2</td><td>insert</td><td>frozen True</td><td>ones</td></tr>" in page


def test_merging_splitting_and_a_raised_k_are_told() -> None:
    model = network(num_tiles=4)
    ffn = model.stack.blocks[0].ffn
    merge_tiles(ffn, 0, 3)
    split_tile(ffn, 1, 3)
    raise_k(ffn, tag="more")
    page = html_report(model, TOKENS, STRINGS)
    for row in (("0", "merge", "dropped 3", ""), ("1", "split", "target 3", ""), ("-", "raise_k", "top_k 2", "more")):
        assert f"<tr><td>0</td><td>0</td>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page


def test_a_free_slot_is_shown_as_such() -> None:
    model = network(num_tiles=4)
    for block in model.stack.blocks:
        with torch.no_grad():
            block.ffn.router.raw_signatures.copy_(torch.randn(16).expand(4, 16))  # tile 0 gets all, and all are alike
    merge_tiles(model.stack.blocks[0].ffn, 0, 2)
    with torch.no_grad():
        model.stack.blocks[0].ffn.router.raw_signatures[2] = model.stack.blocks[0].ffn.router.raw_signatures[0]
    page = html_report(model, TOKENS, STRINGS)
    names = re.findall(r"<th>(.*?)</th>", page)[:10]
    first, second = (
        dict(zip(names, re.findall(r"<td>(.*?)</td>", row), strict=True)) for row in page.split("</table>")[0].split("<tr>")[2:]
    )
    assert (first["unused"], second["unused"]) == ("2", "3")
    assert (first["redundant"], second["redundant"]) == ("3", "6")
    assert [tile for tile, card in enumerate(cards(page)) if '<span class="badge">free</span>' in card] == [2]


def test_padding_is_not_shown_nor_counted() -> None:
    torch.manual_seed(0)
    model = Classifier(None, 2, ClassifierConfig(16, 1, 2, 64, ffn=FFNConfig(num_tiles=4, top_k=1)), vocab_size=9)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    tokens[0, :16] = torch.randint(1, 9, (16,))
    strings = [["", *"abcdefgh"][token] for token in tokens[0].tolist()]
    page = html_report(model, tokens, [strings], labels=torch.zeros(1, dtype=torch.int64))
    assert "<dd>16 tokens, in sequences of at most 64</dd>" in page
    _, (info,), _ = model.eval()(tokens, return_routing=True)
    for tile, card in enumerate(cards(page)):
        assert f"usage: {int((info['tile_idx'][0, :16] == tile).sum()) / 16:.1%}" in card


@pytest.mark.usefixtures("drawn_figures")
def test_sparse_lookup_layers_have_no_weight_matrices_to_tell_of() -> None:
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = SparseLookupFFNv2(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x)[0]

    page = html_report(Model(), IMAGES, labels=LABELS)
    Page(page)
    assert "<td>-</td>" in page
    assert page.count('<div class="tile">') == 4


def test_what_is_given_must_fit() -> None:
    with pytest.raises(ValueError, match=r"tokens \(1 of lengths \[3\]\) must fit inputs \(2, 3\)"):
        html_report(network(), torch.zeros(2, 3, dtype=torch.int64), [["a", "b", "c"]])
    with pytest.raises(ValueError, match=r"tokens \(None\) must be given, or labels"):
        html_report(network(), TOKENS)
    with pytest.raises(ValueError, match=r"labels \(2,\) must have shape \(20, 6\) or \(20,\)"):
        html_report(classifier(), IMAGES, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"number of class_names \(2\) must be > the largest label \(2\)"):
        html_report(classifier(), IMAGES, labels=LABELS, class_names=["a", "b"])


def context_network(**ffn: Any) -> LanguageModel:
    return network(**({"num_tiles": 3, "route_on": "context"} | ffn))


def test_tiles_of_a_model_that_routes_on_context_are_named_by_their_ngrams() -> None:
    model = context_network()
    reader = NgramReader(model)
    page = html_report(model, TOKENS, STRINGS)
    assert page.count("It reads 2 tokens at a time. The usage predicted from the n-grams of 36 tokens (the same tokens)") == 2
    assert page.count("is at most 0.0 points off, from those of the sample itself 0.0.") == 2
    ngrams = count_ngrams(TOKENS, 2)
    for place, card in enumerate(cards(page)):
        layer, tile = divmod(place, 3)
        claims = reader.claims(ngrams, layer)
        rate = f"{float(claims.rates()[tile]):.1%}"
        assert f"<p>usage: {rate} (predicted: {rate})</p>" in card
        expected = claims.of_tile(tile)
        line = re.search(r"<p>n-grams: (.*?)</p>", card)
        assert line is not None
        shares = re.findall(r"<code>.*?</code>&nbsp;(\d+\.\d)%", line[1])
        assert shares == [f"{100 * share:.1f}" for _, share in expected[:8]]
        assert (f"and {len(expected) - 8} more" in line[1]) == (len(expected) > 8)


def test_another_text_predicts_what_tiles_claim() -> None:
    model = context_network()
    letters = [*"abcdefgh"]
    other = CountedText(count_ngrams(torch.tensor([[0, 1, 0, 1]]), 2), letters, "another text")
    page = html_report(model, TOKENS, STRINGS, counted=other)
    assert "The usage predicted from the n-grams of 4 tokens (another text) is at most" in page
    shown = set(re.findall(r"<code>([a-h⊢]+)</code>&nbsp;(\d+\.\d)%", page))
    assert shown == {("⊢a", "25.0"), ("ab", "50.0"), ("ba", "25.0")}


def test_padding_is_no_part_of_an_ngram() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(16, 1, 2, 64, ffn=FFNConfig(num_tiles=4, route_on="context"))
    model = Classifier(None, 2, config, vocab_size=9)
    tokens = torch.zeros(2, 20, dtype=torch.int64)
    tokens[:, :16] = torch.randint(1, 9, (2, 16))
    strings = [["" if not token else "abcdefgh"[token - 1] for token in row] for row in tokens.tolist()]
    page = html_report(model, tokens, strings, labels=torch.tensor([0, 1]))
    assert "from the n-grams of 32 tokens (the same tokens) is at most 0.0 points off" in page


def test_without_context_nothing_is_said_of_ngrams() -> None:
    assert "n-grams" not in html_report(network(), TOKENS, STRINGS)
    assert "n-grams" in html_report(context_network(routing="learned"), TOKENS, STRINGS)


def test_remarks_stand_on_the_cards_of_their_tiles() -> None:
    model = network(num_tiles=2)
    page = html_report(model, TOKENS, STRINGS, remarks={1: ["<p>first</p>", "<p>second</p>"]})
    of_layer = page.split('id="layer-1"')
    assert "<p>first</p>" not in of_layer[0]
    shown = cards(of_layer[1])
    assert ["<p>first</p>" in card for card in shown] == [True, False]
    assert ["<p>second</p>" in card for card in shown] == [False, True]
    with pytest.raises(ValueError, match=r"layer of the remarks \(7\) must be >= 0 and < number of routed layers \(2\)"):
        html_report(model, TOKENS, STRINGS, remarks={7: []})
    with pytest.raises(ValueError, match=r"remarks of layer 0 \(1\) must be as many as its tiles \(2\)"):
        html_report(model, TOKENS, STRINGS, remarks={0: ["x"]})
