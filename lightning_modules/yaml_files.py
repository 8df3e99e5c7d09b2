"""YAML files that somebody else may have made: checked before any parser builds values from them. Loads no torch.

A parser of YAML follows a file wherever it leads: ten short lines of aliases stand for billions of values, and brackets within
brackets for as many calls within calls.
"""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_modules.errors import UserError
from trix.regular_files import read_regular

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 50_000, 50
MAX_PLAIN = 4096  # characters without quotes, which may be a number: 1:1:1 is 3661 in YAML
# libyaml's, where it is there: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAG = re.compile(r"!|tag:yaml\.org,2002:(str|int|float|bool|null|seq|map)")


def read_yaml(path: Path | str) -> Any:
    """The value that the file holds.

    Raises:
        UserError: it is no regular file of UTF-8 YAML, it is larger or nested deeper than a configuration, its aliases stand
            for too many values or hold themselves, or it names a type of Python.
    """
    text = _checked_text(path)
    try:
        return yaml.load(text, Loader=_LOADER)
    except Exception as error:  # no such date, a list as a key, a tag whose type the value is not of: !!int ''
        raise UserError(f"{path} must be YAML: {_problem(error)}") from error


def check_yaml(path: Path | str) -> None:
    """Raise UserError where :func:`read_yaml` does: for files that another parser will read."""
    read_yaml(path)


def _checked_text(path: Path | str) -> str:
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be YAML in UTF-8: byte {error.object[error.start]:#04x} at {error.start} is not"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        check_text(path, text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} must be YAML: {_problem(error)}") from error
    return text


def check_text(path: Path | str, text: str) -> None:
    """As :func:`check_yaml` for what is in a file: values are counted as a reader meets them, what an alias names again."""
    open_values: list[tuple[str | None, int]] = []  # the anchor of each collection, and the number of values before it
    sizes: dict[str, int | None] = {}  # by anchor; None while its collection is open
    num_values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        place = f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 0)
            if size is None:
                raise UserError(f"{place}: a value of the configuration must not hold itself")
            num_values += size
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag is not None and not _PLAIN_TAG.fullmatch(event.tag):
                raise UserError(
                    f"{place}: tag ({event.tag[:80]}) must be one of YAML's own: str, int, float, bool, null, seq, map"
                )
            num_values += 1
            may_be_number = isinstance(event, yaml.ScalarEvent) and (event.tag is not None or not event.style)
            if may_be_number and len(event.value) > MAX_PLAIN:
                raise UserError(f"{place}: length of a value without quotes ({len(event.value)}) must be <= {MAX_PLAIN}")
            is_open = isinstance(event, yaml.CollectionStartEvent)
            if event.anchor is not None:
                sizes[event.anchor] = None if is_open else 1
            if is_open:
                open_values.append((event.anchor, num_values - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, num_before = open_values.pop()
            if anchor is not None:
                sizes[anchor] = num_values - num_before
        if len(open_values) > MAX_DEPTH:
            raise UserError(f"{place}: the depth of the values must be <= {MAX_DEPTH}")
        if num_values > MAX_VALUES:
            raise UserError(
                f"{place}: the number of values must be <= {MAX_VALUES}, those that aliases stand for counted again"
            )


def _problem(error: Exception) -> str:
    """What is wrong and where, without the excerpts from the file."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f" (line {mark.line + 1})"
    return f"{' '.join(str(getattr(error, 'problem', None) or error).split())}{place}"
