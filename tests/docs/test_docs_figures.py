"""Figures in README and docs/ that name their record: `1.639<!-- context_routing(layer="dense 4d").loss_nats_mean -->`.

The comment names a file of benchmarks/results, the one row of its results with these values, and a field. `1 / ` before it
and ` * 1e-6` after it convert the unit. The figure written must be that value, rounded to the digits written.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
FIGURE = re.compile(
    r"(?P<written>\d*\.?\d+)<!-- (?P<inverse>1 / )?(?P<record>\w+)\((?P<row>[^)]*)\)\.(?P<field>\w+)"
    r"(?: \* (?P<factor>[\de.-]+))? -->"
)
CONDITION = re.compile(r'(\w+)=("[^"]*"|\d+)')


def recorded(figure: re.Match[str]) -> float:
    wanted = {name: json.loads(value) for name, value in CONDITION.findall(figure["row"])}
    assert wanted, f"{figure[0]} must say which row"
    record = json.loads((ROOT / f"benchmarks/results/{figure['record']}.json").read_text())
    rows = [row for row in record["results"] if wanted.items() <= {name: row.get(name) for name in wanted}.items()]
    assert len(rows) == 1, f"{figure[0]} must name one row, names {len(rows)}"
    value = float(rows[0][figure["field"]])
    return (1 / value if figure["inverse"] else value) * float(figure["factor"] or 1)


def is_stale(figure: re.Match[str]) -> bool:
    decimals = len(figure["written"].partition(".")[2])
    return abs(recorded(figure) - float(figure["written"])) > 0.5 * 10**-decimals + 1e-9


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "<!--" in text])
def test_a_figure_is_what_its_record_says(page: str) -> None:
    figures = list(FIGURE.finditer(PAGES[page]))
    assert len(figures) == PAGES[page].count("<!--"), "each comment must have the form that the top of this file shows"
    assert [figure[0] for figure in figures if is_stale(figure)] == []


def test_a_stale_figure_is_found() -> None:
    comment = '<!-- context_routing(layer="dense 4d").loss_nats_mean -->'
    found = [FIGURE.search(written + comment) for written in ("1.737", "1.738", "1.74")]
    assert [is_stale(figure) for figure in found if figure] == [False, True, False]
