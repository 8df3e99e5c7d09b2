"""`trix sae planted`: the table, the files, the exit code, and what it refuses."""

import json
import re
import statistics
from pathlib import Path

import pytest
from scipy.stats import fisher_exact

from lightning_modules.cli import main
from lightning_modules.commands.sae_planted import EXIT_NO_BETTER, JUDGED, TITLES, compare, make_parser
from trix.superposition.evaluation.planted import PlantedConfig
from trix.superposition.evaluation.planted_study import PlantedScores, PlantedStudy

SMALL = """\
data: {num_features: 96, mean_active: 3.0, parents: 3, correlation: 0.0}
k: 48
active: 3
batch_size: 128
tokens: 19200
eval_tokens: 1000
controls: [frozen_decoder, soft_frozen_decoder]
"""
OWN = """\
from trix.superposition.sae import TopKSAE


class Frozen(TopKSAE):
    architecture = "frozen"

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.W_dec.requires_grad_(False)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the configuration of a small study."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def planted(*arguments: str) -> int:
    return main(["sae", "planted", *arguments])


def score(recovered: float, by_activation: float) -> PlantedScores:
    return PlantedScores(recovered, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, recovered_by_activation=by_activation)


def test_a_study_is_printed_and_written_and_repeats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--config",
        "small.yaml",
        "--num-features",
        "48",
        "--width",
        "64",
        "--controls",
        "frozen_decoder",
        "frozen_encoder",
    )
    assert planted(*arguments, "--output", "out/found.json") == 0
    out = capsys.readouterr().out
    assert out.startswith("batch_topk, 48 latents, 19,200 tokens: 48 features in 64 dimensions, 3 in a token; means of 3 seeds")
    for title in TITLES.values():
        assert f"\n{title}" in out
    assert "\nbetter than its controls\n" in out
    found = json.loads((folder / "out" / "found.json").read_text())
    assert found["study"]["data"]["num_features"] == 48  # the option wins over the file
    assert found["study"]["active"] == 3
    assert found["environment"]["packages"]["torch"]
    assert found["is_better"]
    assert list(found["results"]) == ["trained", "frozen_decoder", "frozen_encoder", "random_directions"]
    for result in found["results"].values():
        values = [seed["recovered"] for seed in result["seeds"]]
        assert len(values) == 3
        assert result["mean"]["recovered"] == pytest.approx(statistics.fmean(values))
        assert result["standard_deviation"]["recovered"] == pytest.approx(statistics.stdev(values))
    assert found["results"]["random_directions"]["mean"]["mean_f1"] is None
    assert [comparison["measure"] for comparison in found["comparisons"]] == list(JUDGED)
    assert (folder / "out" / "found.svg").read_text().startswith("<?xml")
    again = (*arguments, "--tokens", "2560", "--output")
    assert planted(*again, "1.json") == planted(*again, "2.json")
    first, second = (json.loads((folder / name).read_text()) for name in ("1.json", "2.json"))
    assert first == second


def test_an_architecture_that_learns_no_more_than_its_control_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own_frozen_sae.py").write_text(OWN)
    arguments = ("--config", "small.yaml", "--tokens", "2560", "--output", "found.json")
    assert planted(*arguments, "--architecture", "own_frozen_sae.Frozen") == EXIT_NO_BETTER
    out = capsys.readouterr().out
    assert out.count("; p = 1, not shown to be better\n") == 2
    assert out.splitlines()[-2] == "not shown to be better than its controls"
    assert not json.loads((folder / "found.json").read_text())["is_better"]


def test_one_seed_shows_no_difference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planted("--config", "small.yaml", "--seeds", "1", "--tokens", "1280", "--output", "one.json") == EXIT_NO_BETTER
    assert "one seed shows no difference" in capsys.readouterr().out
    found = json.loads((folder / "one.json").read_text())
    assert found["comparisons"][0]["p_value"] is None
    assert found["results"]["trained"]["standard_deviation"]["recovered"] is None


def test_the_comparison_is_with_the_best_control_and_paired_by_seed() -> None:
    scores = {
        "trained": [score(0.6, 0.5), score(0.7, 0.6), score(0.65, 0.4)],
        "frozen_decoder": [score(0.0, 0.45), score(0.0, 0.62), score(0.0, 0.41)],
        "frozen_encoder": [score(0.2, 0.1), score(0.2, 0.1), score(0.2, 0.1)],
        "random_directions": [score(0.9, 0.9)] * 3,
    }
    by_direction = compare(scores, "recovered", 100)
    assert (by_direction.control, by_direction.of_control) == ("frozen_encoder", pytest.approx(0.2))
    assert by_direction.ratio == pytest.approx(0.65 / 0.2)
    assert by_direction.is_better
    assert by_direction.has_factor
    by_activation = compare(scores, "recovered_by_activation", 100)
    assert by_activation.control == "frozen_decoder"
    assert not by_activation.is_better
    assert not by_activation.has_factor
    nothing = compare({"trained": [score(0.0, 0.0)] * 2, "frozen_encoder": [score(0.0, 0.0)] * 2}, "recovered", 100)
    assert (nothing.ratio, nothing.is_better, nothing.has_factor) == (None, False, False)


@pytest.mark.parametrize(("num_recovered", "is_better"), [(1, False), (2, True), (500, True)])
def test_one_feature_per_seed_is_no_proof_even_with_every_seed(num_recovered: int, is_better: bool) -> None:
    share = num_recovered / 500
    found = compare({"trained": [score(share, 0.0)] * 3, "frozen_encoder": [score(0.0, 0.0)] * 3}, "recovered", 500)
    expected = fisher_exact([[3 * num_recovered, 1500 - 3 * num_recovered], [0, 1500]]).pvalue
    assert found.p_value == pytest.approx(expected)
    assert found.is_better is is_better


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--num-features", "1000000000000"],
            "data.num_features (1000000000000): Input should be less than or equal to 1048576",
        ),
        (["--num-features", "1000000"], "k (512) must be <= 268"),
        (["--width", "1000000000000"], "data.width (1000000000000): Input should be less than or equal to 1048576"),
        (["--config", "silent.yaml"], "eval_tokens (1) must be enough for a feature to fire: with seed 0 none does"),
        (["--active", "9", "--k", "8"], "active (9) must be >= 1 and <= k (8)"),
        (["--num-features", "0"], "--num-features (0) must be >= 1"),
        (["--seeds", "0"], "--seeds (0) must be >= 1"),
        (["--architecture", "topkk"], "import path of a class; did you mean topk?"),
        (["--architecture", "nowhere.SAE"], "class nowhere.SAE (named by architecture) cannot be imported"),
        (["--architecture", "json.JSONDecoder"], "must be a class derived from"),
        (["--controls", "frozen"], "control ('frozen') must be one of frozen_decoder, soft_frozen_decoder, frozen_encoder"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read: No such file or directory"),
        (["--config", "list.yaml"], "list.yaml must hold keys and values"),
        (["--config", "wrong.yaml"], "key 'num_featurs' must be one of"),
        (["--config", "kind.yaml"], "lr ('fast'): Input should be a valid number"),
        (["--seed", "3"], "unknown option --seed of `trix sae planted`; did you mean --seeds?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.yaml").write_text("[1, 2]")
    (folder / "wrong.yaml").write_text("data: {num_featurs: 3}")
    (folder / "kind.yaml").write_text("lr: fast")
    (folder / "silent.yaml").write_text("{data: {mean_active: 0.001}, eval_tokens: 1, tokens: 512}")
    before = sorted(folder.iterdir())
    assert planted(*arguments, "--output", "out/found.json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trix: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(folder.iterdir()) == before


def test_the_help_names_the_defaults_of_the_settings() -> None:
    text = " ".join(make_parser().format_help().split())
    defaults = {**PlantedStudy().model_dump(), **PlantedConfig().model_dump()}
    for name in ("architecture", "k", "width", "num_features", "tokens", "seeds"):
        shown = re.search(rf"--{name.replace('_', '-')} [A-Z]+ [^)]*\(default: (\w+)\)", text)
        assert shown is not None
        assert shown[1] == str(defaults[name])


def test_the_output_is_checked_before_anything_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planted("--output", "found.txt") == 2
    assert "--output (found.txt) must end with .json" in capsys.readouterr().err
    (folder / "found.json").mkdir()
    assert planted("--output", "found.json") == 2
    assert "output found.json must be a file, not a directory" in capsys.readouterr().err
