"""What is asked of latents: yes-or-no questions about the text around a token, none of which its own identity answers.

Shapes: N tokens, in the order of their documents; U documents.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from trix.superposition.evaluation.token_rows import TokenRows
from trix.superposition.viz.token_texts import Tokenizer, token_texts

Answers = NDArray[np.int8]  # 1 yes, 0 no, -1 not known
MAX_LABELS = 8
VOWELS = frozenset("aeiouAEIOU")


def token_targets(rows: TokenRows, tokenizer: Tokenizer) -> dict[str, Answers]:
    """The answers for each token, int8 [N]: 1 yes, 0 no, -1 where the dump lacks the neighbours that would tell.

    The questions: whether the next token begins with a vowel, a white space, a capital; whether the one before begins with a
    vowel; whether the token is the third in a row, or a later one, that goes on with letters; whether it is in the first line
    after an empty one, as are the names of speakers in a play.

    Args:
        rows: those of a document next to each other, as :func:`~trix.superposition.evaluation.token_rows.read_rows` gives them.

    Raises:
        ValueError: a token id that the tokenizer does not know.
    """
    ids, place_N = np.unique(rows.token_N.numpy(), return_inverse=True)
    texts = token_texts(tokenizer, ids.tolist())

    def holds(question: Callable[[str], bool]) -> NDArray[np.bool_]:
        return np.array([question(text) for text in texts], dtype=bool)[place_N]

    begins_with_vowel, begins_with_space, begins_with_capital, goes_on = (
        holds(lambda text: text.strip()[:1] in VOWELS),
        holds(lambda text: text[:1].isspace()),
        holds(lambda text: text.strip()[:1].isupper()),
        holds(lambda text: text[:1].isalpha()),
    )
    follows_N = _follows(rows)
    return {
        "next: vowel": _next(begins_with_vowel, follows_N),
        "next: white space": _next(begins_with_space, follows_N),
        "next: capital": _next(begins_with_capital, follows_N),
        "previous: vowel": _previous(begins_with_vowel, follows_N),
        "third letter or later": _third_or_later(goes_on, follows_N),
        "line after an empty one": _first_lines([texts[place] for place in place_N], follows_N),
    }


def label_targets(label_U: NDArray[np.int64]) -> dict[str, Answers]:
    """Whether a document has each label, int8 [U], for the MAX_LABELS most frequent ones; none where all labels are equal.

    Of two labels one question is asked: whether it is the second.
    """
    labels, counts = np.unique(label_U, return_counts=True)
    frequent = sorted(labels[np.argsort(-counts, kind="stable")[:MAX_LABELS]].tolist())
    asked = frequent[1:] if len(labels) == 2 else frequent if len(labels) > 2 else []
    return {f"label: {label}": (label_U == label).astype(np.int8) for label in asked}


def _follows(rows: TokenRows) -> NDArray[np.bool_]:
    """bool [N]: the row before is the token before, of the same document."""
    is_next_N = (rows.document_N.diff() == 0) & (rows.position_N.diff() == 1)
    return torch.cat([is_next_N.new_zeros(1), is_next_N]).numpy()


def _previous(holds_N: NDArray[np.bool_], follows_N: NDArray[np.bool_]) -> Answers:
    return np.where(follows_N, np.roll(holds_N, 1), -1).astype(np.int8)


def _next(holds_N: NDArray[np.bool_], follows_N: NDArray[np.bool_]) -> Answers:
    return np.where(np.append(follows_N[1:], False), np.roll(holds_N, -1), -1).astype(np.int8)


def _third_or_later(holds_N: NDArray[np.bool_], follows_N: NDArray[np.bool_]) -> Answers:
    """Asked of the tokens that go on with letters alone: the others answer it by what they are."""
    has_two_before_N = follows_N & np.roll(follows_N, 1)
    is_third_N = np.roll(holds_N, 1) & np.roll(holds_N, 2)
    return np.where(has_two_before_N & holds_N, is_third_N, -1).astype(np.int8)


def _first_lines(texts: list[str], follows_N: NDArray[np.bool_]) -> Answers:
    """Asked of tokens that are no white space, once a line has ended in what the dump holds of the document."""
    answers = np.full(len(texts), -1, dtype=np.int8)
    num_breaks, is_first = 0, -1
    for place, text in enumerate(texts):
        if not follows_N[place]:
            num_breaks, is_first = 0, -1
        if text.isspace():
            num_breaks += text.count("\n")
            continue
        if num_breaks:
            is_first = int(num_breaks > 1)
        answers[place] = is_first
        num_breaks = text.count("\n") if text[-1:] == "\n" else 0
    return answers
