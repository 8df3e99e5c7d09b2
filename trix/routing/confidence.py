"""How sure the routing of a token is."""

from torch import Tensor


def routing_confidence(score_TE: Tensor) -> Tensor:
    """The gap between the best two scores: float [T], in the unit of the scores; 0 with a single tile."""
    best = score_TE.topk(min(2, score_TE.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, -1]
