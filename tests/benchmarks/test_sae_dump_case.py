"""The case of a dump: both ways find the same activations, the full run computes everything, and memory is measured."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import sae_dump as case
from small_dumps import ragged_frame


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"WIDTH": 16, "LAYERS": 2, "HEADS": 2, "LONGEST": 32, "BATCH": 8, "memory": lambda *_: None}
    for name, value in sizes.items():
        monkeypatch.setattr(case, name, value)
    monkeypatch.setattr(case, "titles", lambda number: ragged_frame(number, longest=32))


def test_a_full_run_gives_the_input_of_every_block_and_the_logits() -> None:
    backend = case.make_backend(case.titles(10), None)
    tokens = backend.tokenize(case.titles(10)["title"].tolist(), 32)
    states, logits = case.full_run(backend, tokens)
    is_token_BT = tokens["attention_mask"].bool()
    assert len(states) == 2
    for layer, state_BTD in enumerate(states):
        expected_BTD = backend.forward_hidden(**tokens, layer=layer)
        torch.testing.assert_close(state_BTD[is_token_BT], expected_BTD[is_token_BT])
    assert logits.shape[:2] == is_token_BT.shape


def test_both_ways_write_the_same_rows_and_the_table_says_so() -> None:
    results = case.run(1, 30, None)
    assert results["layer"] == 1
    assert 0 < results["largest_difference"] < 2**-8  # bf16 keeps 8 bits
    assert 0 < results["padding_of_full_run"] < 1
    lines = case.table(results).splitlines()
    assert lines[4].startswith(f"| {case.DUMP} | ")
    assert lines[5].endswith("| >= 4 |")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_told_in_shards(capsys: pytest.CaptureFixture[str]) -> None:
    case._print_memory(400, 200, None)
    assert 0 <= float(capsys.readouterr().out) < 1e5
