"""Code blocks of a Markdown recipe, and what they do to a copy of the repository.

A block belongs to the path in backticks that ends the line of prose before it, `path/of/file`: and is written there. Where that
file exists the block is inserted: at its end, or before the bracket that closes the list whose name stands in backticks before
the path, as in "at the end of `FILES` in `ort_ops/operators/__init__.py`:".
"""

import re
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(
    r"^[^\n]*?(?:of `(?P<list_name>\w+)` in )?`(?P<path>[^`\n]+)`:\n\n```\w+\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    path: str
    list_name: str | None
    code: str


def section(text: str, title: str) -> str:
    """What stands under `# title` or `## title`.

    Raises:
        ValueError: no section has this title.
    """
    found = re.search(rf"^##? {re.escape(title)}$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"a section must be titled {title!r}")
    return found[1]


def blocks(recipe: str) -> list[Block]:
    """The blocks of a section that have a path, in order."""
    return [Block(found["path"], found["list_name"], found["code"]) for found in _BLOCK.finditer(recipe)]


def apply(steps: list[Block], root: Path) -> tuple[set[str], set[str]]:
    """Write the blocks into the copy `root`; returns the paths that are new, and those of files that were there before."""
    added, edited = set(), set()
    for path, list_name, code in steps:
        target = root / path
        if path not in added and target.exists():
            edited.add(path)
            target.write_text(_inserted(target.read_text(), list_name, code))
        else:
            added.add(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code)
    return added, edited


def _inserted(text: str, list_name: str | None, code: str) -> str:
    if list_name is None:
        return text + code
    found = re.search(rf"^{list_name}\b[^\n]*[(\[{{]\n(?:    [^\n]*\n)*", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"a list must be named {list_name}")
    return text[: found.end()] + code + text[found.end() :]
