from typing import Any

import pytest

from lightning_modules.errors import UserError
from lightning_modules.signature_values import is_signs, signature_from


@pytest.mark.parametrize(
    "content", ["+0-0", [1, 0, -1, 0], [1.0, 0.0, -1.0, 0.0], {"positive_dims": [0], "negative_dims": [2]}]
)
def test_three_ways_to_write_a_signature(content: Any) -> None:
    assert signature_from(content, 4, "signature") == [1, 0, -1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("+x", r"a.json \(\+x\) must be a row of \+, 0 and -"),
        (7, "a.json must hold a list of numbers, or positive_dims and negative_dims"),
        ([1, True], "a.json must hold a list of numbers"),
        ({"positive_dims": [1]}, "a.json: negative_dims must be a list of integers"),
        ({"positive_dims": [4], "negative_dims": []}, r"a.json: positive_dims \(4\) must be >= 0 and < d_model \(4\)"),
        ({"positive_dims": [1], "negative_dims": [1]}, r"a.json: negative_dims \(1\) must not be named twice"),
    ],
)
def test_what_is_none_of_them_is_named(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        signature_from(content, 4, "a.json")


def test_signs_are_told_from_file_names() -> None:
    assert is_signs("+0--")
    assert not is_signs("+0-.json")
