"""The case of streaming: all tokens are streamed, and memory that is kept shows as growth."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import sae_stream as case

pytestmark = pytest.mark.skipif(not case.STATUS.exists(), reason="needs Linux")


def test_both_streams_give_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 8, "BATCH": 64, "SHARD_TOKENS": 256}.items():
        monkeypatch.setattr(case, name, value)
    results = case.run(2000)
    assert {name: found["tokens"] for name, found in results.items()} == {"dump": 2048, "model": 2048}
    assert case.table(results).splitlines()[2].startswith("| dump | 2048 | ")


def test_memory_that_is_kept_shows_as_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "SHARD_TOKENS", case.BATCH)
    kept: list[torch.Tensor] = []

    def leaking() -> object:
        while True:
            fresh = mmap.mmap(-1, case.BATCH * 576 * 4)  # not memory that earlier tests have left to the allocator
            kept.append(torch.frombuffer(fresh, dtype=torch.float32).fill_(1).reshape(case.BATCH, 576))
            yield kept[-1]

    assert case.growth(leaking(), 9 * case.BATCH)["growth_mb"] == pytest.approx(8 * case.BATCH * 576 * 4 / 1e6, rel=0.3)  # type: ignore[arg-type]
