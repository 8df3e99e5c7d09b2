"""The case of what decides about the tile: its measures, its control, and what its table says first."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import context_routing as case
from code_hash import CodeHash

from trix.nn import ContextCode


def test_the_hash_of_a_code_is_that_of_the_pair() -> None:
    code, router = ContextCode(30, 16), CodeHash(16, 8)
    token_BT = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    tile_P = router(code(token_BT)[0][:, 1]).tile_idx[:, 0]
    in_a_text = torch.tensor([[5, 7, 3, 5, 7]])
    of_text_T = router(code(in_a_text)[0][0]).tile_idx[:, 0]
    assert of_text_T[1] == of_text_T[4] == tile_P[5 * 30 + 7]
    assert torch.bincount(tile_P, minlength=8).min() > 900 / 8 / 2
    assert (tile_P.reshape(30, 30) != tile_P.reshape(30, 30)[0]).any()


def test_information_is_what_one_says_of_the_other() -> None:
    coin, other = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert case.information(coin, coin) == pytest.approx(1.0)
    assert case.information(coin, other) == pytest.approx(0.0)
    assert case.information(np.array([0, 1, 2, 3]), coin) == pytest.approx(1.0)


@pytest.mark.parametrize(("loss", "steps"), [(5.0, 1.0), (3.0, 2.0), (2.5, 2.5), (2.0, 3.0), (1.9, None)])
def test_the_steps_to_a_loss_are_read_between_the_points(loss: float, steps: float | None) -> None:
    assert case.steps_to_reach([[1, 4.0], [3, 2.0], [4, 2.1]], loss) == steps


def test_the_table_begins_with_what_is_lost_and_says_who_never_gets_there() -> None:
    def row(name: str, losses: list[float], last: float, step_ms: float, extra: float = 0.0) -> dict[str, Any]:
        figures = {"curve": [[10, 3.0], [20, last]], "extra_steps": extra, "active_parameters": 1, "parameters": 2}
        runs = {seed: {"loss_nats": loss, **figures} for seed, loss in enumerate(losses)}
        return case.summary(name, "attention", 600, runs, [step_ms, 2 * step_ms, 2 * step_ms])

    rows = [
        row(case.DENSE, [1.7, 1.71], 1.75, 8.0),
        row(case.DRAWN, [1.6, 1.61], 0.5, 4.0),
        row(case.SHORT, [1.6, 1.61], 0.5, 4.0, extra=5.0),
        row(case.PAIR, [1.5, 1.51], 1.8, 16.0),
    ]
    lines = case.table(rows).splitlines()
    assert lines[0].startswith(f"- {case.DRAWN} LOSES to {case.PAIR} (attention, 600 steps): +0.1000 (")
    assert lines[1].startswith(f"- {case.DRAWN} is better than {case.DENSE}")
    cells = {line.split(" | ")[2]: line.split(" | ")[4:6] for line in lines if line.startswith("| attention")}
    assert cells == {
        case.DENSE: ["1.00", "1.00"],
        case.DRAWN: ["0.50", "0.38"],
        case.SHORT: ["0.50", "0.50"],
        case.PAIR: ["2.00", "never"],
    }


def test_a_run_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "FINISHED", tmp_path / "runs.jsonl")
    monkeypatch.setattr(case, "CHURN_EVERY", 1)
    monkeypatch.setattr(case, "STEPS_A_TURN", 1)
    text = tmp_path / "text.txt"
    text.write_text("all is well that ends well, " * 200)
    names = [case.DENSE, case.LEARNED_THEN_FROZEN, case.DRAWN]
    without_bias = replace(case.LAYERS[case.DRAWN], balance_rate=0.0)  # which would move for 20 steps
    monkeypatch.setitem(case.LAYERS, case.DRAWN, without_bias)
    arguments: tuple[Any, ...] = ([4], [0, 1], ["attention"], 1e-2, 0.1, str(text), names)
    rows = case.run(*arguments, False)
    by_name = {row["layer"]: row["runs"] for row in rows}
    for runs in by_name.values():
        for run in runs:
            assert math.isfinite(run["loss_nats"])
            assert [step for step, _ in run["curve"]] == [1, 2, 3, 4]
    for run in by_name[case.DRAWN]:
        assert run["churn"] == [0.0] * 4
        assert run["bits_of_one_before"] > 0
        assert run["active_parameters"] < by_name[case.DENSE][0]["active_parameters"]
    assert by_name[case.LEARNED_THEN_FROZEN][0]["churn"][1:] == [0.0] * 3
    assert case.DRAWN in case.table(rows)
    assert case.figure(rows).axes[0].get_title() == "attention, 4 steps"
    monkeypatch.setattr(case, "measure", None)
    again = case.run(*arguments, True)
    assert [row | {"step_ms": []} for row in again] == [row | {"step_ms": []} for row in rows]
