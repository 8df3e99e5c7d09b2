"""The case of Fisher's tests: the loop gets the same tables; shuffled labels give discoveries only where tokens are counted."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import sae_fisher as case


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LATENTS": 40, "CLASSES": 3, "DOCUMENTS": 300}.items():
        monkeypatch.setattr(case, name, value)


def test_planted_classes_alone_are_discovered() -> None:
    label_P, tokens = case.planted()
    document_N = np.repeat(np.arange(case.DOCUMENTS), case.TOKENS)
    found = case.class_enrichment(tokens, label_P[document_N], document_N)
    own_K = np.arange(case.LATENTS) // 2 % case.CLASSES
    discovered_K = (found.q_KC <= 0.05)[np.arange(case.LATENTS), own_K]
    assert discovered_K[::2].mean() > 0.8
    assert discovered_K[1::2].mean() < 0.1


def test_the_loop_and_ours_agree_and_the_table_says_so() -> None:
    results = case.run(1, 5)
    assert results["tests"] == 120
    assert max(results["largest_difference"].values()) < 1e-9
    assert results["discoveries"] > 10
    assert np.mean(results["shuffled"]) < 1 < np.mean(results["shuffled_by_token"])
    lines = case.table(results).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:8]] == [case.OURS, case.LOOP, case.WHOLE] * 2
    assert lines[3].endswith("| >= 250 |")
    assert lines[6].endswith("| >= 500 |")


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = case.fisher_exact_many
    monkeypatch.setattr(case, "fisher_exact_many", lambda *given: exact(*given) * (1 - 1e-6))
    assert max(case.run(1, 1)["largest_difference"].values()) > 1e-7
