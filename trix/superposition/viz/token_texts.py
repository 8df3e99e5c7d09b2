"""Token ids as texts, by whatever knows how they are written."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

WORD_START = "▁"  # how SentencePiece writes the space before a word
PART = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer writes a token that is not a whole character
MAX_PARTS = 4  # bytes of a character in UTF-8


@runtime_checkable
class PieceTokenizer(Protocol):
    """A tokenizer of Hugging Face."""

    def convert_ids_to_tokens(self, ids: list[int], /) -> Any: ...
    def decode(self, ids: list[int], /) -> Any: ...


Tokenizer: TypeAlias = str | PieceTokenizer | Callable[[list[int]], Sequence[str]]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """How each token is written.

    Args:
        tokenizer: a text whose character i is token i, such as the ``vocabulary`` of a TriXBackend; a tokenizer of Hugging
            Face; or a function from token ids to as many texts.

    Raises:
        ValueError: an id that the tokenizer does not know, or another number of texts.
    """
    ids = [int(idx) for idx in ids]
    if isinstance(tokenizer, str):
        unknown = [idx for idx in ids if not 0 <= idx < len(tokenizer)]
        if unknown:
            raise ValueError(f"token id ({unknown[0]}) must be >= 0 and < size of the vocabulary ({len(tokenizer)})")
        return [tokenizer[idx] for idx in ids]
    if isinstance(tokenizer, PieceTokenizer):  # first, as these can be called, too
        return [_decoded(tokenizer, idx) for idx in ids]
    texts = list(tokenizer(ids))
    if len(texts) != len(ids):
        raise ValueError(f"texts of the tokenizer ({len(texts)}) must be as many as the ids that it got ({len(ids)})")
    return texts


def whole_characters(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str]) -> list[str]:
    """The texts of tokens that stand side by side, as :func:`token_texts` gives them, with whole characters: of those over
    which a tokenizer of Hugging Face has spread a character, the first has the whole text, and the others have none.
    """
    whole = list(texts)
    if isinstance(tokenizer, PieceTokenizer):
        for start in range(len(ids)):
            if PART not in whole[start]:
                continue
            for stop in range(start + 2, min(start + MAX_PARTS, len(ids)) + 1):
                joined = str(tokenizer.decode(list(ids[start:stop])))
                if PART not in joined:
                    whole[start:stop] = [joined, *[""] * (stop - start - 1)]
                    break
    return whole


def _decoded(tokenizer: PieceTokenizer, idx: int) -> str:
    """The text of one token. Decoding keeps no space before the first word where SentencePiece wrote the piece."""
    piece = tokenizer.convert_ids_to_tokens([idx])[0]
    if piece is None:
        raise ValueError(f"token id ({idx}) must be in the tokenizer's vocabulary")
    text = str(tokenizer.decode([idx]))
    return " " + text if piece.startswith(WORD_START) and not text.startswith(" ") else text
