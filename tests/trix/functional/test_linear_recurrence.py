import pytest
import torch

from trix.functional.linear_recurrence import linear_recurrence, parts, segments


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 100, 600])
def test_each_state_follows_from_the_one_before(num_tokens: int, num_channels: int, is_reversed: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    a, x, first = (
        torch.randn(2, *shape, generator=generator, dtype=torch.complex128)
        for shape in ((num_tokens,), (num_tokens, num_channels), (num_channels,))
    )
    a[0, num_tokens // 2] = 0.0
    h, expected = linear_recurrence(a, x, first, is_reversed=is_reversed), first
    for i in reversed(range(num_tokens)) if is_reversed else range(num_tokens):
        expected = a[:, i, None] * expected + x[:, i]
        torch.testing.assert_close(h[:, i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 1), (5, 100), (0, 4, 3)])
def test_segments_are_all_tokens_in_order(shape: tuple[int, ...]) -> None:
    for num_values in (1, 12, 10**6):
        found = [i for part in segments(torch.Size(shape), num_values) for i in range(part.start, part.stop)]
        assert found == list(range(shape[1]))
    assert [part.stop for part in segments(torch.Size((2, 7, 3)), 12)] == [2, 4, 6, 7]


def test_parts_share_no_memory() -> None:
    for z in (torch.tensor([1 + 2j]), torch.randn(3, 4, dtype=torch.complex64).mT):
        re, im = parts(z)
        assert torch.equal(torch.complex(re, im), z)
        assert re.is_contiguous()
        assert im.is_contiguous()
        assert re.untyped_storage().data_ptr() != im.untyped_storage().data_ptr()
