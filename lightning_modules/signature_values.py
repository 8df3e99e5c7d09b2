"""Signatures as people write them: signs, numbers, or the dimensions of each sign. Loads no torch."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from lightning_modules.errors import UserError
from trix.regular_files import read_regular

MAX_FILE_BYTES = 2**22
SIGNS = {"+": 1, "0": 0, "-": -1}


def is_signs(text: str) -> bool:
    return set(text) <= set(SIGNS)


def read_signature(text: str, d_model: int) -> list[float]:
    """The D values of a signature that is written as signs ("+0-") or named as a JSON file of numbers or dimensions.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if is_signs(text):
        return signature_from(text, d_model, "--signature")
    try:
        content = json.loads(read_regular(text, MAX_FILE_BYTES).decode())
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--signature ({text}) must be a row of +, 0 and -, or a file that can be read: {why}") from error
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise UserError(f"{text} must hold JSON: {error}") from error
    return signature_from(content, d_model, text)


def signature_from(content: object, d_model: int, name: str) -> list[float]:
    """The D values of a signature from signs ("+0-"), a list of D numbers, or {"positive_dims": [...], "negative_dims": [...]}.

    Whether signs and numbers are D, and numbers -1, 0 or 1, is left to the layer that takes the signature.

    Args:
        name: what errors call it: a file, or a key.

    Raises:
        UserError: it is nothing of the three; a dimension is outside [0, D) or named twice.
    """
    if isinstance(content, str):
        if not is_signs(content):
            raise UserError(f"{name} ({content:.80}) must be a row of +, 0 and -")
        return [SIGNS[sign] for sign in content]
    if isinstance(content, Mapping):
        return _from_dims(content, d_model, name)
    if not isinstance(content, list) or not all(type(value) in (int, float) for value in content):
        raise UserError(f"{name} must hold a list of numbers, or positive_dims and negative_dims")
    large = next((value for value in content if abs(value) > sys.maxsize), 0)
    if large:  # a tensor would not hold it
        raise UserError(f"{name} must hold the numbers -1, 0 and 1, not {large!r:.20}")
    return content


def _from_dims(content: Mapping[str, Any], d_model: int, name: str) -> list[float]:
    signature_D = [0.0] * d_model
    for key, sign in (("positive_dims", 1), ("negative_dims", -1)):
        dims = content.get(key)
        if not isinstance(dims, list) or not all(type(dim) is int for dim in dims):
            raise UserError(f"{name}: {key} must be a list of integers")
        for dim in dims:
            if not 0 <= dim < d_model:
                raise UserError(f"{name}: {key} ({dim!r:.40}) must be >= 0 and < d_model ({d_model})")
            if signature_D[dim] != 0:
                raise UserError(f"{name}: {key} ({dim}) must not be named twice")
            signature_D[dim] = sign
    return signature_D
