"""Texts to batches of token ids."""

from collections.abc import Sequence

from torch import Tensor

from trix.superposition.backends.base_model import CausalLMBackend


def collate_texts(texts: Sequence[str], backend: CausalLMBackend, max_len: int) -> dict[str, Tensor]:
    """The texts as one batch, ``input_ids`` and ``attention_mask``, both int64 [texts, tokens], padded on the right; see
    :meth:`~trix.superposition.backends.CausalLMBackend.tokenize`.
    """
    return backend.tokenize(texts, max_len)
