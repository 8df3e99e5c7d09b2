"""The questions about tokens: answered as someone answers who reads the text, and open where the dump has a gap."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.superposition.evaluation.targets import MAX_LABELS, label_targets, token_targets
from trix.superposition.evaluation.token_rows import TokenRows

VOCABULARY = "aeXY bcd\n:"


def rows_of(texts: list[str], keep: list[bool] | None = None) -> TokenRows:
    places = [(number, position) for number, text in enumerate(texts) for position in range(len(text))]
    kept = [place for place, is_kept in zip(places, keep or [True] * len(places), strict=True) if is_kept]
    token = torch.tensor([VOCABULARY.index(texts[number][position]) for number, position in kept], dtype=torch.int64)
    document, position = (torch.tensor([place[i] for place in kept], dtype=torch.int64) for i in (0, 1))
    x = torch.zeros(len(kept), 1)
    return TokenRows(x, x, token, document, position, torch.zeros_like(token))


def first_line(text: str, place: int) -> int:
    """Read backwards: what the line breaks before this line were."""
    if text[place].isspace():
        return -1
    start = place
    while start > 0 and text[start - 1] != "\n":
        start -= 1
    if not text[:start].strip(" ") or start == 0:
        return -1 if start == 0 else int(text[:start].count("\n") > 1)
    head = text[:start]
    blank = head[len(head.rstrip()) :]
    return int(blank.count("\n") > 1)


@given(st.lists(st.text(VOCABULARY, min_size=1, max_size=12), min_size=1, max_size=4))
def test_questions_are_answered_as_the_text_says(texts: list[str]) -> None:
    found = token_targets(rows_of(texts), VOCABULARY)
    places = [(text, place) for text in texts for place in range(len(text))]

    def after(text: str, place: int, letters: str) -> int:
        return int(text[place + 1] in letters) if place + 1 < len(text) else -1

    assert found["next: vowel"].tolist() == [after(text, place, "ae") for text, place in places]
    assert found["next: white space"].tolist() == [after(text, place, " \n") for text, place in places]
    assert found["next: capital"].tolist() == [after(text, place, "XY") for text, place in places]
    assert found["previous: vowel"].tolist() == [int(text[place - 1] in "ae") if place else -1 for text, place in places]
    assert found["third letter or later"].tolist() == [
        int(text[place - 2 : place].isalpha()) if place > 1 and text[place].isalpha() else -1 for text, place in places
    ]
    assert found["line after an empty one"].tolist() == [first_line(text, place) for text, place in places]


def test_names_of_speakers_are_found() -> None:
    text = "dd\n\nXab:\nbe ad\nbe\n\n"
    answers = token_targets(rows_of([text]), VOCABULARY)["line after an empty one"]
    assert [text[place] for place in np.flatnonzero(answers == 1)] == list("Xab:")
    assert (answers[:2] == -1).all()  # what came before is not known


@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_gap_leaves_questions_open(keep: list[bool]) -> None:
    text = "ab\n\nXabe"
    found = token_targets(rows_of([text], keep), VOCABULARY)
    kept = [place for place, is_kept in enumerate(keep) if is_kept]
    whole = token_targets(rows_of([text]), VOCABULARY)
    for row, place in enumerate(kept):
        has_next, has_previous = place + 1 in kept, place - 1 in kept
        assert found["next: vowel"][row] == (whole["next: vowel"][place] if has_next else -1)
        assert found["previous: vowel"][row] == (whole["previous: vowel"][place] if has_previous else -1)
        if not has_previous:
            assert found["third letter or later"][row] == -1


def test_pieces_of_words_are_read_by_how_they_begin_and_end() -> None:
    pieces = [" Ab", "cd", "ef", "\n\n", "Xe", " e"]
    token = torch.arange(6)
    x = torch.zeros(6, 1)
    rows = TokenRows(x, x, token, torch.zeros_like(token), token, token)
    found = token_targets(rows, lambda ids: [pieces[idx] for idx in ids])
    assert found["next: white space"].tolist() == [0, 0, 1, 0, 1, -1]
    assert found["next: capital"].tolist() == [0, 0, 0, 1, 0, -1]
    assert found["line after an empty one"].tolist() == [-1, -1, -1, -1, 1, 1]


def test_labels_are_asked_one_by_one_and_two_labels_once() -> None:
    assert label_targets(np.array([3, 3, 3])) == {}
    two = label_targets(np.array([4, 2, 4, 2]))
    assert {name: answer.tolist() for name, answer in two.items()} == {"label: 4": [1, 0, 1, 0]}
    many = label_targets(np.repeat(np.arange(12), np.arange(12) + 1))
    assert list(many) == [f"label: {label}" for label in range(12 - MAX_LABELS, 12)]
    assert many["label: 11"].sum() == 12
