"""What an upcycled model is compared with: the same active width without routing, and routing that knows the answer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.ternary import absmean_ternary
from trix.nn.language_model import LanguageModel
from trix.outputs import RoutingDecision
from trix.upcycling.one_tile import OneTile
from trix.upcycling.upcycled import best_tiles_of, check_upcycling, cut, inputs_of, tiles_of

Pruning = Literal["magnitude", "activity"]


@torch.no_grad()
def prune(network: LanguageModel, token_BT: Tensor, width: int, by: Pruning) -> LanguageModel:
    """The model with ``width`` neurons of each layer in one tile, the same for every token.

    Args:
        by: ``magnitude`` keeps the neurons of the largest |up row| |down column|, of the ternary weights; ``activity`` those of
            the largest mean of relu(up x)^2 |down column| over the text token_BT.
    """
    groups = []
    for layer, x_TD in zip(check_upcycling(network, 1, 1), inputs_of(network, token_BT), strict=True):
        down_norm_F = layer.output(torch.eye(len(layer.up_FD), dtype=x_TD.dtype)).norm(dim=1)
        up_F = layer.hidden(x_TD).mean(dim=0) if by == "activity" else absmean_ternary(layer.up_FD).norm(dim=1)
        groups.append((up_F * down_norm_F).topk(width).indices.sort().values.unsqueeze(0))
    return cut(network, groups, top_k=1)


@contextmanager
def best_choice(upcycled: LanguageModel, layers: Sequence[OneTile], groups: Sequence[Tensor]) -> Iterator[None]:
    """Within the block each token goes to the tiles of :func:`~trix.upcycling.signatures.best_tiles`, which are found by
    computing all of them: what is lost then is lost by the groups, not by the signatures.

    Args:
        layers: those that were cut. groups: into what.
    """
    with ExitStack() as handles:
        for ffn, layer, groups_EH in zip(tiles_of(upcycled), layers, groups, strict=True):

            def choose(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                decision: RoutingDecision,
                layer: OneTile = layer,
                groups_EH: Tensor = groups_EH,
            ) -> RoutingDecision:
                top_k = decision.tile_idx.shape[1]
                is_best_TE = best_tiles_of(layer, groups_EH, inputs[0], top_k)
                return decision._replace(tile_idx=is_best_TE.to(torch.uint8).topk(top_k, dim=1).indices)

            handle = ffn.router.register_forward_hook(choose)
            handles.callback(handle.remove)
        yield


@torch.no_grad()
def held_out_loss(network: LanguageModel, token_BT: Tensor, target_BT: Tensor) -> float:
    """Mean cross entropy of the next token, in nats."""
    total = 0.0
    for part_BT, target in zip(torch.split(token_BT, 64), torch.split(target_BT, 64), strict=True):
        total += float(F.cross_entropy(network(part_BT).flatten(0, 1), target.flatten(), reduction="sum"))
    return total / target_BT.numel()
