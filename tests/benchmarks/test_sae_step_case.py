"""The case of an autoencoder's training step: its control does the same, and its table says what was left out."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import sae_step as case

from trix.superposition.sae.train import take_step


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "LATENTS": 64, "ACTIVE": 4, "TOKENS": 50}.items():
        monkeypatch.setattr(case, name, value)
    for name, value in {"SMALL_WIDTH": 8, "SMALL_LATENTS": 32, "SMALL_TOKENS": 10, "SMALL_STEPS": 4}.items():
        monkeypatch.setattr(case, name, value)


def test_the_control_takes_the_same_step_with_the_latents_in_full() -> None:
    x = case.activations(case.TOKENS, case.WIDTH)
    ours, plain = case.made(16, 64), case.made(16, 64)
    for sae, step in ((ours, lambda sae, adam: take_step(sae, adam, x, x)), (plain, lambda *a: case.step_in_full(*a, x))):
        adam = torch.optim.Adam(sae.parameters(), lr=3e-4)
        for _ in range(3):
            step(sae, adam)
    for (name, value), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=1e-5), name


def test_the_table_has_every_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # importing it fails
    results = case.run(2)
    lines = case.table(results).splitlines()
    assert lines[2].startswith(f"| {case.OURS} | ")
    assert lines[2].endswith(" | 1.00 |")
    assert lines[3].startswith("| plain torch | ")
    assert any(line.startswith("left out: SAELens (") for line in lines)
    assert results["memory_over_latents_in_full"] > 0
    assert len(results["lightning"]["ratios"]) == 2
