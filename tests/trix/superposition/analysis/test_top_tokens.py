import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_sae import ReLUSAE, identity_sae, write_shards

from trix.superposition.analysis import TopTokens, top1_tokens_for_latents, top_tokens, topk_sets_per_latent

pytest.importorskip("pydantic", reason="shards are read by trix.superposition.dump, whose settings need pydantic")


def expected(z_NK: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The largest first, ties by index, none that is not active."""
    ranked = []
    for z_N in z_NK.T.tolist():
        order = sorted((token for token, value in enumerate(z_N) if value > 0), key=lambda token: (-z_N[token], token))
        ranked.append([(token, z_N[token]) for token in order[:k]])
    return ranked


def pairs(top: TopTokens) -> list[list[tuple[int, float]]]:
    rows = zip(top.idx_KA.tolist(), top.value_KA.tolist(), strict=True)
    return [[(token, value) for token, value in zip(*row, strict=True) if token >= 0] for row in rows]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    k=st.integers(1, 8),
    batch=st.integers(1, 20),
    candidates=st.sampled_from([1, 10, 1 << 22]),
)
def test_the_same_tokens_whatever_the_shards_and_batches(
    seed: int, sizes: list[int], k: int, batch: int, candidates: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # So few different values that many are equal.
    acts_NK = torch.randint(-2, 3, (sum(sizes), 5), generator=generator).float()
    acts_NK[:, 2] = -1  # never fires
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_tokens, "MAX_CANDIDATES", candidates)
        paths = write_shards(Path(folder), acts_NK, sizes)
        top = topk_sets_per_latent(identity_sae(5), paths, "cpu", k=k, batch=batch)
    assert pairs(top) == expected(acts_NK.relu(), k)
    assert [set(members) for members in top] == [{token for token, _ in row} for row in pairs(top)]
    assert top[2] == set()


def test_top_tokens_are_a_sequence_of_sets() -> None:
    top = TopTokens(torch.tensor([[4, 1], [3, -1], [-1, -1]]), torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    assert len(top) == 3
    assert list(top) == [{1, 4}, {3}, set()]
    assert top[-2] == {3}
    assert list(top[1:]) == [{3}, set()]
    assert top[0] | top[1] == {1, 3, 4}
    with pytest.raises(ValueError, match=r"idx \(3, 2\) and value \(3, 1\) must both be \[K, A\]"):
        TopTokens(top.idx_KA, top.value_KA[:, :1])


def test_top1_gives_the_token_of_the_vocabulary(tmp_path: Path) -> None:
    acts_NK = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 5.0], [3.0, -1.0, 4.0]])
    paths = write_shards(tmp_path, acts_NK, [1, 2], tokids_N=torch.tensor([70, 80, 90]))
    ids, values = top1_tokens_for_latents(identity_sae(3), np.array([2, 0, 1]), paths, paths, "cpu", batch=2)
    assert ids.tolist() == [70, 80, -1]
    assert values.tolist() == [5.0, 3.0, 0.0]


def test_the_autoencoder_encodes_in_evaluation_and_trains_on(tmp_path: Path) -> None:
    class Noisy(ReLUSAE):
        def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().encode(x_ND)

    sae = Noisy(torch.eye(2), torch.eye(2))
    topk_sets_per_latent(sae, write_shards(tmp_path, torch.ones(3, 2), [3]), "cpu")
    assert sae.training


def test_errors(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, torch.ones(3, 2), [1, 2])
    with pytest.raises(ValueError, match=r"k \(0\) must be >= 1"):
        topk_sets_per_latent(identity_sae(2), paths, "cpu", k=0)
    with pytest.raises(ValueError, match=r"activations \(3, 2\) must be \[N, d_model \(4\)\]"):
        topk_sets_per_latent(identity_sae(4), paths, "cpu")
    with pytest.raises(ValueError, match=r"latents \(0 to 2\) must be >= 0 and < 2"):
        top1_tokens_for_latents(identity_sae(2), [0, 2], paths, paths, "cpu")
    with pytest.raises(ValueError, match=r"tok_files \(2 tokens\) must hold as many tokens as act_files \(3\)"):
        top1_tokens_for_latents(identity_sae(2), [0], paths, paths[1:], "cpu")
    broken = write_shards(tmp_path, torch.full((2, 2), torch.nan), [2])
    with pytest.raises(ValueError, match="latents must be finite"):
        topk_sets_per_latent(identity_sae(2), broken, "cpu")
