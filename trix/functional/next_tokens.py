"""What a language model is asked to predict: at each token the one after it."""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def next_tokens(label_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The target of each token: the label of the token after it, -100 where there is none or either of the two is padding.

    Padding predicts nothing: after it, the first token of a text has nothing before it, as in a text without padding.

    Args:
        label_BT: int64 [B, T], -100 for those that are not predicted. mask_BT: [B, T], 0 for padding.
    """
    target_BT = F.pad(label_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
    if mask_BT is None:
        return target_BT
    is_token_BT = mask_BT.bool()
    return target_BT.masked_fill(~(is_token_BT & F.pad(is_token_BT[:, 1:], (0, 1), value=False)), IGNORED_LABEL)
