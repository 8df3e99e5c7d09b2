import torch

from trix.functional.next_tokens import IGNORED_LABEL, next_tokens


def test_each_token_is_followed_by_the_next_unless_either_is_padding() -> None:
    label = torch.tensor([[5, 6, 7, 8, 9, 4]])
    none = IGNORED_LABEL
    assert next_tokens(label).tolist() == [[6, 7, 8, 9, 4, none]]
    for mask, expected in [
        ([1, 1, 1, 1, 1, 1], [6, 7, 8, 9, 4, none]),
        ([0, 0, 1, 1, 1, 1], [none, none, 8, 9, 4, none]),
        ([1, 1, 1, 0, 0, 0], [6, 7, none, none, none, none]),
        ([1, 1, 0, 1, 1, 0], [6, none, none, 9, none, none]),
        ([0, 1, 0, 1, 0, 1], [none] * 6),
    ]:
        for kind in (torch.int64, torch.bool, torch.float32):
            assert next_tokens(label, torch.tensor([mask]).to(kind)).tolist() == [expected]
    label[0, 3] = none
    assert next_tokens(label).tolist() == [[6, 7, none, 9, 4, none]]
    assert next_tokens(label[:, :1]).tolist() == [[none]]
