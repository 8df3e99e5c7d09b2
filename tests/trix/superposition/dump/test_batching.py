"""Rows in batches: all of them, in order, in memory that no later part changes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.superposition.dump.batching import in_batches, own_pages


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), max_size=8), batch_size=st.integers(1, 40), knows_total=st.booleans())
def test_batches_hold_all_rows_in_order_though_the_parts_share_a_buffer(
    sizes: list[int], batch_size: int, knows_total: bool
) -> None:
    total = sum(sizes)
    acts_ND, id_N = torch.arange(2 * total).view(-1, 2).bfloat16(), torch.arange(total)
    buffer = {"acts": torch.empty(30, 2, dtype=torch.bfloat16), "id": torch.empty(30, dtype=torch.int64)}

    def parts():  # type: ignore[no-untyped-def]
        for acts, ids in zip(acts_ND.split(sizes), id_N.split(sizes), strict=True):
            buffer["acts"][: len(ids)], buffer["id"][: len(ids)] = acts, ids
            yield {name: rows[: len(ids)] for name, rows in buffer.items()}

    found = list(in_batches(parts(), batch_size, total if knows_total else None))
    buffer["acts"].zero_()
    assert all(len(batch["id"]) == batch_size for batch in found[:-1])
    assert all(0 < len(batch["id"]) <= batch_size for batch in found[-1:])
    assert torch.equal(torch.cat([batch["id"] for batch in found] or [id_N]), id_N)
    assert torch.equal(torch.cat([batch["acts"] for batch in found] or [acts_ND.float()]), acts_ND.float())
    if knows_total:
        assert sum(batch["acts"].untyped_storage().nbytes() for batch in found) == 8 * total


def test_own_pages_are_zeros_that_can_be_written() -> None:
    for shape in ((3, 5), (0, 4), (7,)):
        x = own_pages(shape, torch.bfloat16)
        assert x.shape == shape
        assert x.dtype == torch.bfloat16
        assert torch.equal(x.float(), torch.zeros(shape))
        x += 1
        assert torch.equal(x.float(), torch.ones(shape))
