import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted_sae import ReLUSAE
from safetensors.torch import save_file
from torch import Tensor

from trix.superposition.merge import (
    MergedSAE,
    cosine_dist_from_decoder,
    load_merged_sae,
    merge_matrix_from_labels,
    merge_sae,
    save_merged_sae,
)

LABELS = [1, 0, 1, 2, 0]


def base(seed: int = 0) -> ReLUSAE:
    generator = torch.Generator().manual_seed(seed)
    return ReLUSAE(torch.randn(4, 5, generator=generator), torch.randn(5, 4, generator=generator))


def activations(num_tokens: int = 200) -> Tensor:
    return torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(9))


def merged_sae() -> MergedSAE:
    return merge_sae(base(), LABELS, lambda: torch.split(activations(), 64))


def test_it_encodes_the_sums_of_clusters_and_decodes_them_linearly() -> None:
    merged, x_ND = merged_sae(), activations()
    x_hat_ND, z_NM = merged(x_ND)
    matrix_KM = torch.from_numpy(merge_matrix_from_labels(LABELS, [1, 0, 3]))
    torch.testing.assert_close(z_NM, base().encode(x_ND) @ matrix_KM)
    assert ((z_NM == 0) == (base().encode(x_ND) @ matrix_KM == 0)).all()
    torch.testing.assert_close(x_hat_ND, z_NM @ merged.W_dec + merged.b_dec)
    assert (merged.d_model, merged.k) == (4, 3)


def test_its_decoder_can_be_clustered_again() -> None:
    merged = merged_sae()
    assert merged.dec.weight.shape == (4, 3)
    assert merged.dec.weight.data_ptr() == merged.W_dec.data_ptr()
    twice = merge_sae(merged, [0, 0, 1], lambda: [activations()])
    assert cosine_dist_from_decoder(twice.dec.weight).shape == (2, 2)
    torch.testing.assert_close(twice.encode(activations())[:, 0], merged.encode(activations())[:, :2].sum(dim=1))


def test_a_saved_one_gives_the_same(tmp_path: Path) -> None:
    merged, x_ND = merged_sae(), activations()
    save_merged_sae(merged, tmp_path / "new" / "merged.safetensors")
    other = base(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = load_merged_sae(tmp_path / "new" / "merged.safetensors", other)
    for found, expected in zip(loaded(x_ND), merged(x_ND), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items()), "the base is copied"
    assert {name: value.dtype for name, value in loaded.to_tensors().items()} == {
        "base.W_enc": torch.float32,
        "base.b_enc": torch.float32,
        "base.W_dec": torch.float32,
        "base.b_dec": torch.float32,
        "merge_map": torch.int64,
        "W_dec": torch.float32,
        "b_dec": torch.float32,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("merge_map"), "must include merge_map"),
        (lambda tensors: tensors.pop("base.W_enc"), "must be those of a merged autoencoder"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "must be those of a merged autoencoder"),
        (lambda tensors: tensors["W_dec"].fill_(torch.nan), "W_dec (12 values that are not) must be finite"),
        (lambda tensors: tensors["merge_map"].add_(1), "labels (1 to 3, 3 different) must be 0 to M - 1 without gaps"),
        (lambda tensors: tensors.update(merge_map=torch.tensor([0, 1, 2])), "merge_map (3 latents) must map the k (5) latents"),
        (lambda tensors: tensors.update(merge_map=torch.rand(5)), "labels (float32 (5,)) must be a vector of integers"),
        (
            lambda tensors: tensors.update(merge_map=tensors["merge_map"].bfloat16()),
            "labels (float32 (5,)) must be a vector of integers",
        ),
        (
            lambda tensors: tensors.update(merge_map=torch.eye(3)[tensors["merge_map"]]),
            "must be those of a merged autoencoder with this base: merge_map (float [5, 3]) must be int [5]",
        ),
        (
            lambda tensors: tensors.update(W_dec=torch.zeros(3, 4, dtype=torch.int64)),
            "W_dec (torch.int64) must be of floating-point numbers",
        ),
        (lambda tensors: tensors.update(W_dec=torch.zeros(4, 4)), "W_dec (4, 4) must be [M (3), D]"),
        (lambda tensors: tensors.update(b_dec=torch.zeros(5)), "b_dec (5,) must be [D (4)]"),
        (
            lambda tensors: tensors.update({"base.W_enc": torch.zeros(3, 5)}),
            "must be those of a merged autoencoder",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    tensors = merged_sae().to_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_merged_sae(tmp_path / "changed.safetensors", base())
    assert "\n" not in str(raised.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_merged_sae(tmp_path / "text.safetensors", base())
    with pytest.raises(OSError, match="directory"):
        load_merged_sae(tmp_path, base())
