"""The code blocks of the README and of docs/: each Python block runs, each YAML block is one, each command is one of `trix`."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import exported_models
import pytest
import yaml  # type: ignore[import-untyped]

from lightning_modules.cli import main
from lightning_modules.commands.table import COMMANDS
from trix.nn import FFNConfig

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
EXTRA = re.compile(r"# needs (\w+)")
OWN_FILE = re.compile(r"# \w+\.py\n")  # tests/recipes writes these files, and runs the commands of their pages
KINDS = {"python", "bash", "sh", "yaml", "cpp", "text", "console"}


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The kind and the text of each block of a page, without its indent."""
    for found in BLOCK.finditer(PAGES[page]):
        lines = found["text"].splitlines(keepends=True)
        yield found["kind"], "".join(line.removeprefix(found["indent"]) for line in lines)


def python(page: str, *, extra: str | None = None) -> list[str]:
    """The Python blocks that need this extra package; without one, those that need none."""
    texts = [text for kind, text in blocks(page) if kind == "python" and not OWN_FILE.match(text)]
    return [text for text in texts if (found[1] if (found := EXTRA.match(text)) else None) == extra]


def commands(page: str) -> list[list[str]]:
    """The arguments of each line `trix ...` in blocks of the shell."""
    lines = [line.split(" > ")[0] for kind, text in blocks(page) if kind in ("bash", "sh") for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("trix ")]


def run(texts: list[str], page: str) -> None:
    names: dict[str, object] = {"__name__": page}
    for text in texts:
        exec(compile(text, page, "exec"), names)


ALL_COMMANDS = {shlex.join(arguments): arguments for page in PAGES for arguments in commands(page)}
LIGHT = {command.name: command for command in COMMANDS if not command.is_training}
# Without those that need a run, or a file of a recipe.
TRAININGS = [
    line for line, (name, *_) in ALL_COMMANDS.items() if name not in LIGHT and not re.search(r"--resume|own_\w+\.yaml", line)
]


def test_pages_have_blocks_of_known_kinds_alone() -> None:
    for page in PAGES:
        assert PAGES[page].count("```") == 2 * len(list(blocks(page))), page
        assert {kind for kind, _ in blocks(page)} <= KINDS, page
    assert len(python("README.md")) >= 2
    assert len(ALL_COMMANDS) >= 30


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exported_models.export(tmp_path, FFNConfig(num_tiles=4))
    run(python(page), page)


def test_the_python_that_needs_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="`make test-transformers` runs it")
    monkeypatch.chdir(tmp_path)
    pages = [page for page in PAGES if python(page, extra="transformers")]
    assert pages
    for page in pages:
        run(python(page, extra="transformers"), page)


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_the_lines_of_the_shell_are_valid(page: str) -> None:
    for kind, text in blocks(page):
        if kind == "yaml":
            assert isinstance(yaml.safe_load(text), dict), text
        elif kind in ("bash", "sh"):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("line", [line for line, arguments in ALL_COMMANDS.items() if arguments[0] in LIGHT])
def test_a_command_is_accepted_by_its_parser(line: str) -> None:
    name, *arguments = ALL_COMMANDS[line]
    import_module(LIGHT[name].module).make_parser().parse_args(arguments)


@pytest.mark.parametrize("line", TRAININGS)
def test_the_options_of_a_training_exist(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ALL_COMMANDS[line]
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "--print_config"]) == 0, capfd.readouterr()
