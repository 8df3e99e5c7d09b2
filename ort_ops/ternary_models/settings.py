"""Values of a configuration that somebody else may have written: JSON, each value checked as it is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ort_ops.ternary_models.errors import CheckpointError
from trix.regular_files import read_regular

MAX_JSON_BYTES = 2**24


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file of at most 16 MB.

    Raises:
        CheckpointError: no such file, or anything else than an object in it.
    """
    try:
        content = json.loads(read_regular(path, MAX_JSON_BYTES))
        repr(content)  # what is nested too deeply to be shown in an error is refused here
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} ({type(content).__name__}) must be a JSON object")
    return content


class Settings:
    """Values of a configuration by name, each checked as it is read; ``where`` is its file, for the errors.

    A missing value, or null, is the default. Without a default it must be there.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def whole(self, name: str, least: int, largest: int, default: int | None = None) -> int:
        """Raises CheckpointError for anything else than a whole number from least to largest."""
        value = self._given(name, default)
        if type(value) is not int or not least <= value <= largest:
            wanted = str(least) if least == largest else f"a whole number from {least} to {largest}"
            raise CheckpointError(f"{name} of {self.where} ({value!r:.40}) must be {wanted}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Raises CheckpointError for anything else than a number above 0 that float32 holds."""
        value = self._given(name, default)
        is_number = type(value) in (int, float) and 0 < value <= float(np.finfo(np.float32).max)
        if not is_number or float(value) < float(np.finfo(np.float32).tiny):
            raise CheckpointError(f"{name} of {self.where} ({value!r:.40}) must be a number > 0 that float32 holds")
        return float(value)

    def text(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """Raises CheckpointError for anything else than one of the texts."""
        value = self._given(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise CheckpointError(f"{name} of {self.where} ({value!r:.40}) must be {' or '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool:
        """False by default. Raises CheckpointError for anything else than true or false."""
        value = self._given(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{name} of {self.where} ({value!r:.40}) must be true or false")
        return value

    def token(self, name: str, vocab_size: int) -> int | None:
        """A token's number; None where there is none, which some files write as -1. Raises CheckpointError for any other."""
        return None if self.values.get(name) in (None, -1) else self.whole(name, 0, vocab_size - 1)

    def tokens(self, name: str, vocab_size: int, largest_number: int) -> tuple[int, ...]:
        """The same for one token or a list of some."""
        found = self.values.get(name)
        if not isinstance(found, list):
            token = self.token(name, vocab_size)
            return () if token is None else (token,)
        if len(found) > largest_number:
            raise CheckpointError(f"tokens in {name} of {self.where} ({len(found)}) must be <= {largest_number}")
        return tuple(Settings({name: token}, self.where).whole(name, 0, vocab_size - 1) for token in found)

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.where} must hold {name}")
        return default
