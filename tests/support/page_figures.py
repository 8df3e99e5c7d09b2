"""Pages without their pictures: drawing them takes most of the time of a small run, three seconds of CPU in four."""

import html
from collections.abc import Iterator
from typing import Any

import pytest

from trix.introspection.page import drawing

DRAWING = "trix.introspection.report.drawing"


def undrawn(_: Any, description: str) -> str:
    return f'<p><img alt="{html.escape(description)}" src="data:,"></p>'


@pytest.fixture(scope="module", autouse=True)
def undrawn_figures() -> Iterator[None]:
    """Figures of report pages are made, but not turned into pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DRAWING, undrawn)
        yield


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the pages themselves."""
    monkeypatch.setattr(DRAWING, drawing)
