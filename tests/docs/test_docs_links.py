"""The links of README, CONTRIBUTING, SECURITY and docs/: files that exist, and headings that those files have."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "ort_ops/native/kernels/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
MAX_README_LINES = 150


def anchors(page: Path) -> set[str]:
    """Of each heading the name that Markdown gives it: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading_in_it(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} must lead to a file"
        assert target.is_relative_to(ROOT), f"{link} must stay in the repository"
        assert not heading or heading in anchors(target), f"{link} must name a heading; there are {sorted(anchors(target))}"


def test_a_link_of_each_kind_is_found() -> None:
    assert LINK.findall("[a](b.md#c) ![d](e.png)") == ["b.md#c", "e.png"]
    assert "a-new-kernel" in anchors(ROOT / "ort_ops/native/kernels/README.md")


def test_the_readme_is_short_and_each_page_can_be_reached_from_it() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= MAX_README_LINES
    reached, ahead = set(), [readme]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(CODE.sub("", page.read_text()))}
        ahead.extend(target for target in targets - reached if target.suffix == ".md" and target.exists())
    assert set((ROOT / "docs").rglob("*.md")) <= reached
