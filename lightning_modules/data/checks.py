"""Ranges of settings that the DataModules share."""

import sys

from lightning_modules.errors import DataError


def check_at_least(minimum: int, **values: int) -> None:
    """Raise DataError for the first named value that is not an int in [minimum, sys.maxsize]."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{name} ({value!r}) must be an int")
        if value < minimum:
            raise DataError(f"{name} ({value}) must be >= {minimum}")
        if value > sys.maxsize:
            raise DataError(f"{name} ({value}) must be <= {sys.maxsize}")


def check_fraction(**values: float) -> None:
    """Raise DataError for the first named value that is not a number strictly between 0 and 1."""
    for name, value in values.items():
        if not isinstance(value, float | int):
            raise DataError(f"{name} ({value!r}) must be a float")
        if not 0.0 < value < 1.0:
            raise DataError(f"{name} ({value}) must be in (0, 1)")
