"""The recipes docs/how-to/own-*.md, followed to the letter in a folder outside the packages."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_modules.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.(py|yaml))\n")


class Block(NamedTuple):
    kind: str
    text: str


def blocks(body: str) -> Iterator[Block]:
    for match in BLOCK.finditer(body):
        indent = match["indent"]
        yield Block(match["kind"], "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True)))


RECIPES = {path.stem: list(blocks(path.read_text())) for path in sorted((ROOT / "docs/how-to").glob("own-*.md"))}
PARTS = [page for page, of_page in RECIPES.items() if any(FILE_NAME.match(block.text) for block in of_page)]


def test_the_recipes_are_there() -> None:
    kinds = ("autoencoder", "callback", "data", "mixer", "router", "task", "tile")
    assert PARTS == [f"own-{kind}" for kind in kinds]


@pytest.mark.parametrize("page", PARTS)
def test_a_recipe_works_as_it_stands(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules = []
    for kind, text in RECIPES[page]:
        if kind == "sh":
            run_commands(text, capfd)
            continue
        name = FILE_NAME.match(text)
        assert name is not None, f"a block must say in its first line which file it is: {text[:80]}"
        (tmp_path / name[1]).write_text(text)
        modules.append(Path(name[1]).stem)
    for module in modules:
        sys.modules.pop(module, None)


def run_commands(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    for line in text.splitlines():
        command, *arguments = shlex.split(line)
        if command == "pytest":
            assert pytest.main([*arguments, "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]) == 0, line
            continue
        assert command == "trix"
        code = main(arguments)
        out, err = capfd.readouterr()
        assert code == 0, f"{line}\n{out}\n{err}"
        assert "could not" not in err, f"{line}\n{err}"
