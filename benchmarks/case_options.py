"""Values of a case's options, which are checked as they are read: before anything is computed, or anything kept is touched."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number in this range."""
    rule = f"must be a whole number >= {least}" + ("" if most is None else f" and <= {most}")

    def value_of(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} {rule}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} {rule}")
        return value

    return value_of


def positive(text: str) -> float:
    """The type of an option that is a number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number > 0 and finite")
    return value


def share(text: str) -> float:
    """The type of an option that is a number in [0, 1)."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number >= 0 and < 1")
    return value


def _number(text: str) -> float:
    """nan where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


seed_number = whole(0, 2**32 - 1)


def check_distinct(**options: Sequence[Any]) -> None:
    """Raise SystemExit where a value of one of these options is given more than once."""
    for name, values in options.items():
        for value, count in Counter(values).items():
            if count > 1:
                raise SystemExit(f"--{name}: {value} ({count} times) must be given once")
