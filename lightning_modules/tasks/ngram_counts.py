"""The n-grams of what a task was trained on, for networks that route on context."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lightning_modules.data.data_module import RunData
from lightning_modules.tasks.token_ids import check_token_ids

if TYPE_CHECKING:  # what a training has no need of
    from trix.introspection.ngrams import CountedText

COUNTED_TOKENS = 2**18


def count_training_text(
    network: nn.Module, data: RunData, names: Sequence[str], context_length: int, padding_token: int | None = None
) -> "CountedText | None":
    """The n-grams of the first COUNTED_TOKENS tokens that training reads; None for a network that reads none.

    Args:
        names: how each id is written. padding_token: an id that is no token.

    Raises:
        DataError: the data cannot be had, or holds other ids.
    """
    from trix.introspection.ngrams import CountedText, NgramReader, count_ngrams, joined, routes_on_context

    if not routes_on_context(network):
        return None
    num_tokens = NgramReader(network).num_tokens
    parts = []
    for inputs in data.training_inputs(COUNTED_TOKENS):
        token_BT = check_token_ids(inputs, names, context_length)
        mask_BT = None if padding_token is None else token_BT != padding_token
        parts.append(count_ngrams(token_BT, num_tokens, mask_BT))
    return CountedText(joined(parts), names, "training text") if parts else None
