"""The quality, recall and routing cases of the resolvent: what they choose, what they ask, and what their tables say first."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


from bk_contestants import Contestant, Size
from cases import bk_quality, bk_recall, bk_router

from trix.nn import Mixer
from trix.outputs import State, StateSpec, TokenContext

TINY = Size(16, 2, 2, 16, 2, 40_000)


class Leaking(Mixer):
    """The mean of all tokens, later ones too."""

    def __init__(self, d_model: int, **settings: Any) -> None:
        super().__init__()

    def state_specs(self) -> tuple[StateSpec, ...]:
        return ()

    def forward(self, x_BTD: Tensor, context: TokenContext, state: State | None = None) -> tuple[Tensor, State, None]:
        return x_BTD.mean(dim=1, keepdim=True).expand_as(x_BTD), (), None


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(bk_quality.SIZES, "small", TINY)
    monkeypatch.setattr(bk_router, "SIZE", TINY)
    for case in (bk_quality, bk_recall, bk_router):
        monkeypatch.setattr(case, "FINISHED", tmp_path / "runs.jsonl")
    text = tmp_path / "text.txt"
    text.write_text("all is well that ends well, " * 60)
    return str(text)


def quality(path: str, only: list[str], resume: bool = False, choosing_seeds: int | None = None) -> dict[str, Any]:
    return bk_quality.run(["small"], [2], [0, 1], choosing_seeds, [1e-4, 1e-2], only, path, resume)


def test_the_rate_is_chosen_on_one_half_and_reported_on_the_other(path: str) -> None:
    results = quality(path, ["ssd", "hermitian"])
    for row in results["rows"]:
        means = {lr: sum(run["choosing_nats"] for run in runs) for lr, runs in row["runs"].items()}
        assert row["lr"] == float(min(means, key=lambda lr: means[lr])) == 1e-2
        assert list(row["losses"].values()) == [run["reported_nats"] for run in row["runs"]["0.01"]]
    ours, anchor = (list(row["losses"].values()) for row in reversed(results["rows"]))
    (answer,) = results["answers"]
    assert answer["mean_difference"] == pytest.approx(sum(ours) / 2 - sum(anchor) / 2)
    assert "| small | 2 | ssd |" in bk_quality.table(results)
    for row in results["rows"]:
        runs = row["runs"][str(row["lr"])]
        halves = [run[half] for run in runs for half in ("choosing_nats", "reported_nats")]
        assert row["both_halves_nats_mean"] == pytest.approx(sum(halves) / 4)
    assert bk_quality.figure(results).axes[0].get_title() == "small, 2 steps"


def test_seeds_that_do_not_choose_train_at_the_chosen_rate_alone(path: str) -> None:
    (row,) = quality(path, ["ssd"], choosing_seeds=1)["rows"]
    assert row["lr"] == 1e-2
    assert {lr: len(runs) for lr, runs in row["runs"].items()} == {"0.0001": 1, "0.01": 2}
    assert list(row["losses"]) == ["0", "1"]
    for wrong in (0, 3):
        with pytest.raises(SystemExit, match=rf"choosing-seeds \({wrong}\) must be >= 1 and <= the number of seeds \(2\)"):
            quality(path, ["ssd"], choosing_seeds=wrong)


def test_finished_runs_are_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bk_quality, "seconds_per_step", lambda configs, _: {name: [1.0] for name in configs})
    first = quality(path, ["minGRU"])
    monkeypatch.setattr(bk_quality, "train_model", None)
    assert quality(path, ["minGRU"], resume=True) == first
    with pytest.raises(TypeError):  # it trains
        quality(path, ["minGRU"], resume=False)


def test_the_table_begins_with_what_is_lost() -> None:
    row = {"size": "small", "steps": 2, "parameters": 1, "state_floats": 1.0, "cpu_s_per_step": 1.0, "lr": 1e-3}
    row |= {"both_halves_nats_mean": 1.5}
    losses = {"one_way": (1.0, 2.0), "hermitian": (1.1, 2.101), "ssd": (1.2, 2.202), "hermitian, no gauge": (1.0, 2.3)}
    rows = [
        row | {"contestant": name, "losses": {"0": a, "1": b}, "loss_nats_mean": (a + b) / 2, "loss_nats_spread": b - a}
        for name, (a, b) in losses.items()
    ]
    lines = bk_quality.table({"rows": rows, "answers": bk_quality.answers(rows)}).splitlines()
    assert lines[0].startswith("- hermitian LOSES to one_way (small, 2 steps): +0.1005 (")
    assert lines[1].startswith("- hermitian is not shown to differ from hermitian, no gauge")
    assert lines[2].startswith("- hermitian is better than ssd")


def test_who_looks_ahead_is_not_measured(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bk_quality.CONTESTANTS, "leaking", Contestant(f"{__name__}.Leaking"))
    with pytest.raises(ValueError, match="logits of leaking before token"):
        quality(path, ["leaking"])


def test_every_key_asked_for_was_given_with_its_answer() -> None:
    token_BT, target_BT = bk_recall.texts(5, 7, torch.Generator().manual_seed(0))
    assert token_BT.shape == (7, 20)
    for token_T, target_T in zip(token_BT.tolist(), target_BT.tolist(), strict=True):
        given = dict(zip(token_T[:10:2], token_T[1:10:2], strict=True))
        assert len(given) == 5
        assert [given[key] for key in token_T[10:]] == target_T[10:]
        assert {*target_T[:10]} == {-100}


def test_accuracy_is_that_of_the_answers_alone() -> None:
    class LookUp(nn.Module):
        def forward(self, token_BT: Tensor) -> Tensor:
            before_BT1, num_pairs = token_BT[:, :, None], token_BT.shape[1] // 4
            is_key_BTP = before_BT1 == token_BT[:, None, : 2 * num_pairs : 2]
            value_BTP = token_BT[:, None, 1 : 2 * num_pairs : 2].expand(is_key_BTP.shape)
            return nn.functional.one_hot((is_key_BTP * value_BTP).sum(dim=-1), bk_recall.VOCAB_SIZE).float()

    assert bk_recall.accuracy(LookUp(), 4) == 1.0
    assert bk_recall.accuracy(nn.Embedding(bk_recall.VOCAB_SIZE, bk_recall.VOCAB_SIZE), 4) < 0.1


def test_recall_counts_the_best_rate_of_each_width(path: str) -> None:
    results = bk_recall.run([2], [2, 4], [1e-3, 1e-2], 2, [0], ["attention + convolution", "hermitian"], False)
    assert [(result["contestant"], result["query_width"]) for result in results] == [
        ("attention + convolution", None),
        ("hermitian", 2),
        ("hermitian", 4),
    ]
    for result in results:
        assert result["accuracy"] == max(result["accuracy_by_rate"].values())
    assert results[1]["state_floats"] < results[2]["state_floats"]
    assert "| 2 | attention + convolution |" in bk_recall.table(results)
    assert len(bk_recall.figure(results).axes[0].lines) == 2


def test_one_model_learns_all_numbers_of_pairs(path: str) -> None:
    shapes = [token.shape for token, _ in bk_recall.batches([1, 3], 20, torch.Generator().manual_seed(0))]
    assert set(shapes) == {(512, 4), (170, 12)}  # 2048 tokens, or what whole texts leave of them
    results = bk_recall.run([1, 3], [16], [1e-2], 2, [0], ["attention + convolution"], False)
    assert [result["pairs"] for result in results] == [1, 3]
    assert results[0]["config"] == results[1]["config"]
    assert results[0]["state_floats"] < results[1]["state_floats"]
    assert len(bk_recall.FINISHED.read_text().splitlines()) == 1


def test_recall_says_first_who_is_better_and_which_goals_are_missed() -> None:
    result = {"contestant": "hermitian", "pairs": 8, "query_width": 16, "state_floats": 1.0}
    rates = {"0.001": 0.5, "0.003": 0.995, "0.01": 0.99, "0.03": 0.1}
    ours = [result | {"accuracy": accuracy, "accuracy_by_rate": rates} for accuracy in (0.995, 0.9)]
    ssd = ours[1] | {"contestant": "ssd", "accuracy": 0.997}
    lines = bk_recall.table([*ours, ssd]).splitlines()
    assert lines[0] == "- hermitian LOSES to ssd, 8 pairs: 0.995 against 0.997"
    assert lines[1] == "- MISSED: hermitian, 8 pairs: 2 of 4 rates >= 0.9, goal 3"
    assert lines[2] == "- reached: hermitian, 8 pairs: 0.995, goal 0.99"
    vector = ssd | {"contestant": "hermitian, vector state", "accuracy": 0.2}
    assert (
        "- reached: hermitian, vector state fails, 8 pairs: 0.200, a guess among the values seen 0.125"
        in bk_recall.table([vector]).splitlines()
    )


def test_recall_has_no_more_pairs_than_keys() -> None:
    with pytest.raises(SystemExit, match=r"pairs \(\[4, 33\]\) must be >= 1 and <= 32"):
        bk_recall.run([4, 33], [16], [1e-3], 1, [0], None, True)


def test_the_routings_differ_in_routing_alone(path: str) -> None:
    results = bk_router.run(2, [0], [1e-3], path, False)
    assert [result["routing"] for result in results] == list(bk_router.ROUTINGS)
    assert all(0.0 <= result["runs"][0]["lowest_relative_entropy"] <= 1.0 for result in results)
    assert len({result["config"]["ffn"]["num_tiles"] for result in results}) == 1
    assert {result["state_floats"] for result in results} == {2 * 16 * 16 + 3 * (16 + 2 * 16) + 2 * 2}  # of the mixer alone
    assert results[1]["config"]["ffn"]["routing_args"] == {"edge_rate": 0.0}
    assert results[0]["runs"][0]["lowest_relative_entropy"] != results[1]["runs"][0]["lowest_relative_entropy"]
    assert "in the worst seed, goal 0.9: " in bk_router.table(results)


def test_each_routing_is_reported_at_the_rate_that_the_first_half_chooses(path: str) -> None:
    results = bk_router.run(2, [0], [1e-4, 1e-2], path, False)
    for result in results:
        means = {lr: sum(run["choosing_nats"] for run in runs) for lr, runs in result["runs_by_rate"].items()}
        assert result["lr"] == float(min(means, key=lambda lr: means[lr])) == 1e-2
        assert result["runs"] == result["runs_by_rate"]["0.01"]
        reported = result["runs"][0]["reported_nats"]
        causal = "to the last bit" if result["is_causal_bitwise"] else "to rounding"
        start = f"| {result['routing']} | {result['state_floats']:,.0f} | {causal} | 0.01 | 1 |"
        assert any(
            line.startswith(start) and line.endswith(f"| {reported:.4f} (0.0000) |")
            for line in bk_router.table(results).splitlines()
        )
