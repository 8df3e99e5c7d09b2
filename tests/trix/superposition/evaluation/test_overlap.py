"""How much of the held-out part stands in the training part: counted run by run, in windows that overlap or do not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_dumps import trix_backend

from trix.superposition.config import DumpConfig
from trix.superposition.dump import ActivationDump, dump_sites
from trix.superposition.evaluation.measure import Split
from trix.superposition.evaluation.overlap import seen_share
from trix.superposition.evaluation.token_rows import TokenRows

LENGTH, NUM_WINDOWS = 40, 60


def split_of(starts: list[int], folder: Path) -> Split:
    """Windows of one random text, dumped."""
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), size=NUM_WINDOWS * LENGTH))
    frame = pd.DataFrame({"title": [text[start : start + LENGTH] for start in starts], "topic": 0})
    config = DumpConfig(max_len=LENGTH, batch_size=16, shard_tokens=1000, dtype="fp32")
    (dumped,) = dump_sites(frame, "title", "topic", trix_backend(), config, ["resid_pre.1"], folder).values()
    return Split(ActivationDump(dumped), None, 0.3, 1)


def seen(split: Split, *num_tokens: int) -> float:
    return seen_share(split.dump, split.held_out, split.seed, *num_tokens)


def runs(rows: TokenRows, num_tokens: int) -> list[tuple[int, ...]]:
    """The runs of neighbouring tokens of a document."""
    found = []
    for first in range(len(rows.token_N) - num_tokens + 1):
        part = slice(first, first + num_tokens)
        if len(rows.document_N[part].unique()) == 1 and bool((rows.position_N[part].diff() == 1).all()):
            found.append(tuple(rows.token_N[part].tolist()))
    return found


@pytest.mark.parametrize("num_tokens", [8, 32])
def test_runs_of_overlapping_windows_are_counted(num_tokens: int, tmp_path: Path) -> None:
    starts = np.random.default_rng(1).integers(0, (NUM_WINDOWS - 1) * LENGTH, size=NUM_WINDOWS).tolist()
    split = split_of(starts, tmp_path)
    held_out = runs(TokenRows.joined(split.held_out_rows()), num_tokens)
    known = set(runs(TokenRows.joined(split.training_rows()), num_tokens))
    expected = sum(run in known for run in held_out) / len(held_out)
    assert 0.05 < seen(split, num_tokens) < 0.9
    assert seen(split, num_tokens) == pytest.approx(expected)


def test_windows_side_by_side_share_nothing_and_the_same_window_twice_all(tmp_path: Path) -> None:
    side_by_side = [LENGTH * place for place in range(NUM_WINDOWS)]
    assert seen(split_of(side_by_side, tmp_path / "apart")) == 0
    assert seen(split_of([0] * NUM_WINDOWS, tmp_path / "same")) == 1


def test_documents_shorter_than_a_run_have_no_share(tmp_path: Path) -> None:
    assert np.isnan(seen(split_of([0, 40, 80], tmp_path), LENGTH + 1))
