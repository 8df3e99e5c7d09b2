import re
from html.parser import HTMLParser

import pytest
import torch

from trix.introspection import html_report
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

TEXT = "<b>&\n "


def network() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(len(TEXT), LanguageModelConfig(16, 2, 2, 12, ffn=FFNConfig(num_tiles=3))).eval()


class Balance(HTMLParser):
    """Every opened element is closed, in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """<rect/> closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escapes_the_text() -> None:
    token = torch.randint(0, len(TEXT), (2, 12), generator=torch.Generator().manual_seed(0))
    model = network()
    model.stack.blocks[0].ffn.freeze_signature(1)
    page = html_report(model, token, [[TEXT[t] for t in row] for row in token.tolist()], title="<em>")
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert "<em>" not in page
    assert "<b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:|#layer)", page)
    assert page.count('<div class="tile">') == 2 * 3
    assert page.count('<span class="badge">frozen</span>') == 1
    assert page.count("<img") == 2 * 5


def test_tokens_must_fit_the_inputs() -> None:
    with pytest.raises(ValueError, match=r"tokens \(1 of lengths \[3\]\) must fit inputs \(2, 3\)"):
        html_report(network(), torch.zeros(2, 3, dtype=torch.int64), [["a", "b", "c"]])
