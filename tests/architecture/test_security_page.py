"""SECURITY.md says what is safe to open: every line of its tables names a test, and the test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()


def rows() -> list[str]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [line for line in lines if not re.match(r"\| File \||\|-", line)]


def test_every_line_names_a_test_that_is_there() -> None:
    assert len(rows()) >= 10
    for row in rows():
        named = re.findall(r"`([\w/]+/test_\w+\.py)`", row.split("|")[-2])
        assert named, row
        for name in named:
            assert "\ndef test_" in (ROOT / "tests" / name).read_text(), name


def test_every_test_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`([\w/]+/test_\w+\.py)`", PAGE):
        assert (ROOT / "tests" / name).is_file(), name
