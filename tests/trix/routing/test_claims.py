import pytest
import torch

from trix.routing import ClaimMatrix


def test_rates_purity_and_dominant_class_by_hand() -> None:
    claims = ClaimMatrix(num_tiles=3, num_classes=2)
    claims.update(torch.tensor([[0], [0], [1], [0]]), torch.tensor([0, 0, 0, 1]))
    assert claims.compute()[:, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert claims.compute()[:, 1].tolist() == [1.0, 0.0, 0.0]
    assert claims.purity().tolist() == pytest.approx([2 / 3, 1.0, 0.0])
    assert claims.dominant_class().tolist() == [0, 0, -1]


def test_a_label_per_example_counts_for_all_of_its_tokens() -> None:
    claims = ClaimMatrix(2, 2)
    claims.update(torch.tensor([[[0], [1]], [[1], [1]]]), torch.tensor([0, 1]))
    assert claims.count_EC.tolist() == [[1, 0], [1, 2]]


def test_more_classes_than_tiles_and_ignored_labels() -> None:
    claims = ClaimMatrix(2, 50)
    claims.update(torch.tensor([[0], [1], [1]]), torch.tensor([49, -100, 7]))
    assert claims.count_EC.sum() == 2
    assert claims.compute()[0, 49] == 1.0


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label \({label}\) must be in \[0, num_classes \(5\)\) or -100"):
        ClaimMatrix(2, 5).update(torch.tensor([[0]]), torch.tensor([label]))


def test_labels_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label \(3,\) must have shape \(2, 4\) or \(2,\)"):
        ClaimMatrix(2, 5).update(torch.zeros(2, 4, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


def test_counts_of_two_parts_add_up_and_reset() -> None:
    whole, parts = ClaimMatrix(4, 3), ClaimMatrix(4, 3)
    tile_idx, label = torch.randint(0, 4, (20, 2)), torch.randint(0, 3, (20,))
    whole.update(tile_idx, label)
    parts.update(tile_idx[:7], label[:7])
    parts.update(tile_idx[7:], label[7:])
    assert torch.equal(whole.count_EC, parts.count_EC)
    parts.reset()
    assert parts.count_EC.sum() == 0
