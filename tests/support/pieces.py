"""A text that a language model reads in pieces, compared with its answer to the whole."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trix.nn import LanguageModel
from trix.outputs import State


def assert_pieces_are_the_whole(model: LanguageModel, token_BT: Tensor, cuts: Iterable[int]) -> Sequence[State]:
    """Logits and tiles are those of the whole text, wherever it is cut; returns the state after it."""
    logits, infos, _ = model(token_BT, return_routing=True)
    places = sorted({*cuts, 0, token_BT.shape[1]})
    state: Sequence[State] = model.empty_state(len(token_BT))
    for start, stop in itertools.pairwise(places):
        (part, part_infos, _), state = model(token_BT[:, start:stop], state=state)
        torch.testing.assert_close(part, logits[:, start:stop])
        for info, part_info in zip(infos, part_infos, strict=True):
            assert torch.equal(part_info["tile_idx"], info["tile_idx"][:, start:stop])
    return state
