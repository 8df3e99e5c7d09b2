"""YAML made to do harm is refused before a parser builds its values; other YAML is read as it is."""

from pathlib import Path

import hostile
import pytest
from limited_memory import limited_memory

from lightning_modules.errors import UserError
from lightning_modules.yaml_files import check_yaml, read_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bomb() -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])


YAML_FILES: dict[str, tuple[bytes, str]] = {
    "aliases of aliases": (bomb().encode(), "line 5: the number of values must be <= 50000"),
    "100,000 brackets": (b"a: " + b"[" * 100_000, "line 1: the depth of the values must be <= 50"),
    "100,000 dashes": (b"- " * 100_000, "line 1: the depth of the values must be <= 50"),
    "a thousand keys within keys": ("".join(f"{' ' * i}a:\n" for i in range(1000)).encode(), "the depth of the values"),
    "itself": (b"a: &a\n  b: *a\n", "line 2: a value of the configuration must not hold itself"),
    "a tab": (b"a:\n\tb: 1", r"must be YAML: .* \(line 2\)"),
    "binary": (b"\x80\x02\x00\xff", "must be YAML in UTF-8: byte 0x80 at 0 is not"),
    "control characters": (b"a: \x00", "must be YAML: "),
    "a call": (
        b"a: !!python/object/apply:os.system ['ls']",
        r"tag \(tag:yaml.org,2002:python/object/apply:os.system\) must be",
    ),
    "an object": (b"!!python/object:os.PathLike {}", r"tag \(tag:yaml.org,2002:python/object:os.PathLike\) must be"),
    "thousands of digits": (b"a: " + b"1:" * 10_000 + b"1", r"length of a value without quotes \(20001\) must be <= 4096"),
    "many values": (b"[" + b"a," * 60_000 + b"]", "the number of values must be <= 50000"),
    "1 MiB": (b"#" * (2**20 + 1), r"its size \(1048577 bytes\) must be <= 1048576"),
    "two documents": (b"a: 1\n---\nb: 2\n", "must be YAML: "),
    "no such day": (b"a: 2020-13-45", "must be YAML: month must be in"),
    "an integer without digits": (b"a: !!int ''", "must be YAML: "),
    "a truth that is none": (b"a: !!bool x", "must be YAML: "),
    "a list as a key": (b"? [1, 2]\n: 3", "must be YAML: "),
}


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml(name: str, folder: Path) -> None:
    content, problem = YAML_FILES[name]
    Path("bad.yaml").write_bytes(content)
    with limited_memory(2**28), pytest.raises(UserError, match=f"^bad.yaml.*{problem}") as caught:
        read_yaml("bad.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_of_another_kind_than_a_regular_file(folder: Path) -> None:
    hostile.pipe(Path("pipe"))
    hostile.sparse(Path("large"), 2**30)
    for path, problem in (("pipe", "not a pipe"), ("/dev/zero", "not a device"), ("large", "must be <="), (".", "directory")):
        with pytest.raises(UserError, match=f"{path} cannot be read: .*{problem}"):
            check_yaml(path)


def test_honest_yaml_is_read_as_it_is(folder: Path) -> None:
    Path("a.yaml").write_text("\ufeffa: &a {b: 1e-3, c: [null, true]}\nd: *a\ne:\n  <<: *a\n  c: text\n", encoding="utf-8")
    values = {"b": "1e-3", "c": [None, True]}  # YAML 1.1: a float has a point
    assert read_yaml("a.yaml") == {"a": values, "d": values, "e": values | {"c": "text"}}
