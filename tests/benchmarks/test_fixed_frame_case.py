"""The case of the fixed frame: equal tiles for all, what is measured and kept, missing data, what the table says first."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import fixed_frame as case

from lightning_modules.errors import DataError


@pytest.mark.parametrize("kind", case.DATA)
def test_all_contestants_have_equal_tiles_and_the_active_compute_of_the_narrow_layer(kind: str) -> None:
    for name in case.LAYERS:
        ffn = case.layer_of(name, kind)
        if ffn.kind == "dense":
            continue
        layer = ffn.build(case.D_MODEL)
        assert isinstance(layer, case.TriXFFN)
        assert layer.num_tiles == case.NUM_TILES[kind]
        assert layer.tiles.tile_width == case.layer_of("dense d", kind).d_ff


def test_a_run_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "FINISHED", tmp_path / "runs.jsonl")
    monkeypatch.setattr(case, "CHURN_EVERY", 1)
    names = ["dense d", "hash of the token", "signatures on hidden", case.DRAWN]
    arguments: tuple[Any, ...] = (["digits"], [0, 1], [0], 4, 4, names)
    results = case.run(*arguments, False)
    by_name = {row["layer"]: row["runs"] for row in results["rows"]}
    assert [run["seed"] for run in by_name["dense d"]] == [0, 1]
    for runs in by_name.values():
        for run in runs:
            assert math.isfinite(run["loss_nats"])
            assert 0 < run["error"] < 1
    for run in by_name[case.DRAWN] + by_name["hash of the token"]:
        assert run["churn"] == [0.0] * 3
        assert run["max_over_mean_load"] < 4
    assert any(any(run["churn"]) for run in by_name["signatures on hidden"])
    signatures = 2 * 8 * case.D_MODEL
    assert by_name[case.DRAWN][0]["active_parameters"] - by_name["hash of the token"][0]["active_parameters"] == signatures
    assert case.DRAWN in case.table(results)
    monkeypatch.setattr(case, "measure", None)
    assert case.run(*arguments, True) == results


def test_data_that_is_not_here_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(kind: str, seed: int) -> None:
        raise DataError(f"{kind} must be installed for seed {seed}")

    monkeypatch.setattr(case, "FINISHED", tmp_path / "runs.jsonl")
    monkeypatch.setattr(case, "data_module", missing)
    results = case.run(["language_id"], [0], [3], 1, 1, None, False)
    assert results == {"left_out": {"language_id": "language_id must be installed for seed 3"}, "rows": []}
    assert case.table(results).startswith("- language_id is left out: language_id must be installed for seed 3")


def test_tiles_of_padding_are_not_looked_at() -> None:
    torch.manual_seed(0)
    ffn = case.FFNConfig(num_tiles=4, route_on="context")
    model = case.Classifier(None, 2, case.ClassifierConfig(32, 1, 2, 6, ffn=ffn), 9)
    tiles = case.tiles_of(model, torch.tensor([[3, 4, 0, 0], [5, 6, 7, 0]]))
    assert tiles is not None
    assert tiles.shape == (1, 5)
    assert case.load(model, torch.tensor([[3, 3, 3, 0]]))["num_dead"] >= 2


def test_the_table_begins_with_what_is_lost_in_any_data() -> None:
    def row(kind: str, name: str, losses: list[float]) -> dict[str, Any]:
        figures = {"error": 0.1, "cpu_seconds": 2.0, "active_parameters": 1, "parameters": 2, "churn": []}
        runs = [{"seed": seed, "loss_nats": loss, **figures} for seed, loss in enumerate(losses)]
        return case.summary(name, kind, 4, runs)

    rows = [row("digits", "dense d", [0.3, 0.312]), row("digits", case.DRAWN, [0.2, 0.21])]
    rows += [row("language_id", "dense 4d", [1.0, 1.01]), row("language_id", case.DRAWN, [1.1, 1.112])]
    lines = case.table({"left_out": {}, "rows": rows}).splitlines()
    assert lines[0].startswith(f"- language_id: {case.DRAWN} LOSES to dense 4d: +0.1010 nats (")
    assert lines[1].startswith(f"- digits: {case.DRAWN} is better than dense d: -0.1010 nats (")
    cells = [line.split(" | ")[:2] for line in lines if line.startswith(("| digits", "| language"))]
    assert [name for _, name in cells] == [case.DRAWN, "dense d", "dense 4d", case.DRAWN]
