"""What a benchmark has computed outlives bad options, a missing text, and a new beginning."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


import run
from cases import bk_quality, bk_recall, bk_router, char_lm_quality
from kept_runs import put_aside

CASES = (bk_quality, bk_recall, bk_router, char_lm_quality)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of an earlier call, instead of every case's own."""
    path = tmp_path / "runs.jsonl"
    path.write_text("days of work\n")
    for case in CASES:
        monkeypatch.setattr(case, "FINISHED", path)
    return path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bk_quality --lrs 2e-3 0", "argument --lrs: 0 must be a number > 0 and finite; see "),
        ("context_routing --dropout 1", "argument --dropout: 1 must be a number >= 0 and < 1"),
        ("bk_quality --lrs nan", "argument --lrs: nan must be a number > 0 and finite"),
        ("bk_quality --steps 300 0", "argument --steps: 0 must be a whole number >= 1"),
        ("bk_quality --steps 1.5", "argument --steps: 1.5 must be a whole number >= 1"),
        ("bk_quality --seeds -1", "argument --seeds: -1 must be a whole number >= 0 and <= 4294967295"),
        ("bk_quality --seeds 0 1 0", "--seeds: 0 (2 times) must be given once"),
        ("bk_quality --choosing-seeds 0", "argument --choosing-seeds: 0 must be a whole number >= 1"),
        ("bk_quality --choosing-seeds 6", "choosing-seeds (6) must be >= 1 and <= the number of seeds (5)"),
        ("bk_quality --only none", "argument --only: invalid choice: 'none'"),
        ("bk_quality --learning-rate 1", "unrecognized arguments: --learning-rate"),
        ("bk_quality --path {tmp}/none.txt", "{tmp}/none.txt"),
        ("bk_router --steps 0", "argument --steps: 0 must be a whole number >= 1"),
        ("bk_router --lrs inf", "argument --lrs: inf must be a number > 0 and finite"),
        ("bk_router --lrs 1e-3 .001", "--lrs: 0.001 (2 times) must be given once"),
        ("bk_router --path {tmp}/none.txt", "{tmp}/none.txt"),
        ("bk_recall --pairs 4 33", "argument --pairs: 33 must be a whole number >= 1 and <= 32"),
        ("bk_recall --widths 0", "argument --widths: 0 must be a whole number >= 1"),
        ("bk_recall --steps -5", "argument --steps: -5 must be a whole number >= 1"),
        ("bk_recall --lrs one", "argument --lrs: one must be a number > 0 and finite"),
        ("bk_recall --seeds 3 3", "--seeds: 3 (2 times) must be given once"),
        ("char_lm_quality --steps 0", "argument --steps: 0 must be a whole number >= 1"),
        ("char_lm_quality --lr 0", "argument --lr: 0 must be a number > 0 and finite"),
        ("char_lm_quality --only nothing", "argument --only: invalid choice: 'nothing'"),
        ("char_lm_quality", "tinyshakespeare"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line_and_costs_no_run(
    command: str, said: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_text").mkdir()
    monkeypatch.setenv("TRIX_DATA_DIR", str(tmp_path / "no_text"))
    output = tmp_path / "record.json"
    assert run.main([*command.format(tmp=tmp_path).split(), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(tmp=tmp_path) in line
    assert kept.read_text() == "days of work\n"
    assert not output.exists()
    assert not [*tmp_path.glob("*.bak*")]


def test_a_new_beginning_puts_the_runs_aside(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bk_recall, "measure", lambda *_: [])
    arguments = ([4], [16], [1e-3], 1, [0], ["ssd"])
    bk_recall.run(*arguments, True)
    assert kept.exists()
    bk_recall.run(*arguments, False)
    assert not kept.exists()
    assert (tmp_path / "runs.jsonl.bak").read_text() == "days of work\n"


def test_what_was_put_aside_stays_whatever_is_put_aside_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    put_aside(path)  # nothing is there
    assert not [*tmp_path.iterdir()]
    for content in ("first", "second", "third"):
        path.write_text(content)
        put_aside(path)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"runs.jsonl.bak": "first", "runs.jsonl.bak2": "second", "runs.jsonl.bak3": "third"}
    assert str(tmp_path / "runs.jsonl.bak3") in capsys.readouterr().out
