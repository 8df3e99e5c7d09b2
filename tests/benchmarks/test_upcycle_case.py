"""The case of layers cut into tiles: all contenders are measured once, kept, and told with the width that a token meets."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import upcycle as case

from lightning_modules.data.text import TextDataModule
from trix.upcycling import signatures


def test_all_contenders_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all is well that ends well, " * 200)
    monkeypatch.setattr(case, "TextDataModule", lambda path, **settings: TextDataModule(path=path, **settings))
    for name, value in {"WIDTH": 16, "NUM_TILES": 4, "TOP_KS": (4, 2), "FINISHED": tmp_path / "runs.jsonl"}.items():
        monkeypatch.setattr(case, name, value)
    monkeypatch.setattr(signatures, "STEPS", 3)
    settings: dict[str, Any] = {"steps": 2, "more_steps": 2, "seeds": [0], "lr": 1e-2, "more_lr": 1e-2, "corpus": str(text)}
    rows = case.run(**settings, resume=False)
    found = {(row["contender"], row["top_k"]): row for row in rows}
    original, all_tiles = found[case.ORIGINAL, 4], found[case.NAMES["coactive"], 4]
    assert all_tiles["as_cut"]["mean"] == pytest.approx(original["as_cut"]["mean"], rel=1e-5)
    some = {name for name, top_k in found if top_k == 2}
    assert some == {*case.NAMES.values(), *case.PRUNED.values(), case.LEARNING, case.BEST_CHOICE, case.FROM_SCRATCH}
    as_cut, trained = ({name: found[name, 2][stage] for name in some} for stage in ("as_cut", "trained"))
    assert as_cut[case.LEARNING] == as_cut[case.NAMES["coactive"]]
    assert {name for name in some if as_cut[name] is None} == {case.FROM_SCRATCH}
    assert {name for name in some if trained[name] is None} == {case.BEST_CHOICE}
    assert all(trained[name] != as_cut[name] for name in some)
    lines = case.table(rows).splitlines()
    assert any(
        line.startswith(f"| 8 | {case.PRUNED['activity']} | {as_cut[case.PRUNED['activity']]['mean']:.3f} ") for line in lines
    )
    monkeypatch.setattr(case, "held_out_loss", None)  # nothing is measured anew
    assert case.run(**settings, resume=True) == rows
