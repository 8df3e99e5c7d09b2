"""The case of merging: latents of one direction are found and lose nothing; random clusters have the sizes that they should."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import sae_merge as case
from small_dumps import small_dump

from lightning_modules.errors import UserError
from trix.superposition.dump import ActivationDump
from trix.superposition.merge.merged_sae import MergedSAE
from trix.superposition.sae import SAE, SparseAutoencoder

WIDTH = 32  # of the small dump


def twins() -> SparseAutoencoder:
    """x and -x of each dimension, each by two latents with half the value: x_hat = x."""
    sae = SparseAutoencoder(WIDTH, 4 * WIDTH)
    direction_KD = torch.cat([torch.eye(WIDTH), torch.eye(WIDTH), -torch.eye(WIDTH), -torch.eye(WIDTH)])
    sae.set_weights(0.5 * direction_KD.T.contiguous(), torch.zeros(4 * WIDTH), direction_KD, torch.zeros(WIDTH))
    return sae.eval()


def test_twins_are_merged_without_loss_and_random_clusters_have_the_right_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, merge = [], case.merge_sae

    def noted(sae: SAE, label_K: np.ndarray, batches: Callable[[], Iterator[Tensor]]) -> MergedSAE:
        labels.append(label_K)
        return merge(sae, label_K, batches)

    monkeypatch.setattr(case, "MERGED", 2 * WIDTH)
    monkeypatch.setattr(case, "merge_sae", noted)
    results = case.compared(ActivationDump(small_dump(tmp_path)[0]), twins(), 2)
    by_direction, *same_sizes, equal_a, equal_b = labels
    assert [by_direction[:WIDTH].tolist(), by_direction[2 * WIDTH : 3 * WIDTH].tolist()] == [
        by_direction[WIDTH : 2 * WIDTH].tolist(),
        by_direction[3 * WIDTH :].tolist(),
    ]
    for label_K in same_sizes:
        assert sorted(np.bincount(label_K)) == sorted(np.bincount(by_direction))
        assert label_K.tolist() != by_direction.tolist()
    assert np.bincount(equal_a).tolist() == np.bincount(equal_b).tolist() == [2] * (2 * WIDTH)
    assert equal_a.tolist() != equal_b.tolist()
    assert results["largest_cluster"] == 2
    assert results["unmerged"] == pytest.approx(1, abs=1e-6)
    assert results["merged"][case.BY_DIRECTION] == [pytest.approx(1, abs=1e-3)]


def test_the_goal_is_about_the_better_of_the_random_clusters() -> None:
    merged = {case.BY_DIRECTION: [0.7], case.SAME_SIZES: [0.2, 0.4], case.EQUAL_SIZES: [0.1, 0.3]}
    lines = case.table({"unmerged": 0.8, "merged": merged, "largest_cluster": 9, "tokens": 1}).splitlines()
    assert lines[3] == "| merged by direction | 0.700 (0.700 to 0.700) | 0.100 |"
    assert lines[-2].endswith("random clusters: 0.400 (goal: >= 0.2)")


def test_a_dump_needs_its_autoencoder() -> None:
    with pytest.raises(UserError, match=r"--dump \(acts\) and --sae \(None\) must be given together"):
        case.run(1, 1, "acts", None)
