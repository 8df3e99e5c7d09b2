"""Characters as token ids: what tasks over text check and write.

Shape suffixes: B texts, T characters of a text.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.errors import DataError, UserError


def check_length(prompt: str, limit: int) -> None:
    """Raise UserError unless the prompt has at least one character and fits the context."""
    if not 1 <= len(prompt) <= limit:
        raise UserError(f"length of the prompt ({len(prompt)}) must be >= 1 and <= context_length ({limit})")


def check_token_ids(token_BT: Tensor, vocabulary: Sequence[str], limit: int) -> Tensor:
    """The ids themselves.

    Raises:
        DataError: they are none of the vocabulary's, or a text is longer than limit.
    """
    if token_BT.is_floating_point() or token_BT.dim() != 2:
        raise DataError(f"inputs of the data ({token_BT.dtype} {tuple(token_BT.shape)}) must be token ids, int64 [B, T]")
    if not 1 <= token_BT.shape[1] <= limit:
        raise DataError(f"length of the data's texts ({token_BT.shape[1]}) must be >= 1 and <= context_length ({limit})")
    low, high = (int(bound) for bound in token_BT.aminmax())
    if low < 0 or high >= len(vocabulary):
        raise DataError(
            f"token ids of the data ({low} to {high}) must be >= 0 and < characters of the vocabulary ({len(vocabulary)})"
        )
    return token_BT


def characters(token_BT: Tensor, vocabulary: Sequence[str]) -> list[list[str]]:
    """Each token by the character that it stands for."""
    return [[vocabulary[token] for token in token_T] for token_T in token_BT.tolist()]
