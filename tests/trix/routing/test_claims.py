from pathlib import Path

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


def test_undeclared_classes_grow_with_the_labels() -> None:
    claims = ClaimMatrix(3)
    claims.update(torch.tensor([[0], [2]]), torch.tensor([1, 1]))
    claims.update(torch.tensor([[1], [1]]), torch.tensor([6, -100]))
    assert claims.num_classes == 7
    assert claims.count_EC[:, 1].tolist() == [1, 0, 1]
    assert claims.dominant_class().tolist() == [1, 6, 1]
    with pytest.raises(ValueError, match=r"label \(-1\) must be >= 0 or -100"):
        claims.update(torch.tensor([[0]]), torch.tensor([-1]))
    claims.reset()
    assert claims.num_classes == 1
    assert claims.dominant_class().tolist() == [-1, -1, -1]


def test_assignments_of_weight_zero_are_not_counted() -> None:
    claims = ClaimMatrix(3, 2)
    weight = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 0.0]])
    claims.update(torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([0, 1, 1]), weight=weight)
    assert claims.count_EC.tolist() == [[1, 0], [1, 1], [0, 0]]


def test_masked_tokens_do_not_count_even_if_their_label_is_no_class() -> None:
    claims = ClaimMatrix(2, 3)
    label = torch.tensor([[0, 1, 99], [2, -1, -1]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    claims.update(torch.tensor([[[0], [1], [1]], [[1], [1], [1]]]), label, mask)
    assert claims.count_EC.tolist() == [[1, 0, 0], [0, 1, 1]]


def test_persistent_counts_survive_a_state_dict_and_grow_on() -> None:
    claims, loaded, plain = ClaimMatrix(2, is_persistent=True), ClaimMatrix(2, is_persistent=True), ClaimMatrix(2)
    claims.update(torch.tensor([[0], [1]]), torch.tensor([4, 0]))
    loaded.load_state_dict(claims.state_dict())
    assert torch.equal(loaded.count_EC, claims.count_EC)
    loaded.update(torch.tensor([[0]]), torch.tensor([9]))
    assert claims.num_classes == 5
    assert plain.state_dict() == {}
    with pytest.raises(ValueError, match=r"counts \(2, 5\) must have shape \(3, 1\)"):
        ClaimMatrix(3, is_persistent=True).load_state_dict(claims.state_dict())
    with pytest.raises(ValueError, match=r"counts \(2, 5\) must have shape \(2, 6\)"):
        ClaimMatrix(2, 6, is_persistent=True).load_state_dict(claims.state_dict())


def count_on_rank(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        claims = ClaimMatrix(2)
        if rank == 1:  # classes that rank 0 never met
            claims.update(torch.tensor([[0], [1], [1]]), torch.tensor([0, 3, 3]))
        else:
            claims.update(torch.tensor([[0]]), torch.tensor([0]))
        assert claims.compute().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
        with claims.sync_context():
            assert claims.count_EC.tolist() == [[2, 0, 0, 0], [0, 0, 0, 2]]
        assert int(claims.count_EC.sum()) == (3 if rank == 1 else 1)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_met_different_classes_add_up(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(count_on_rank, (str(tmp_path / "store"),), nprocs=2)
