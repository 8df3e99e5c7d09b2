"""Which class goes to which tile, counted."""

import torch
from torch import Tensor
from torchmetrics import Metric

IGNORED_LABEL = -100


class ClaimMatrix(Metric):
    """count[e, c] = number of assignments of tokens of class c to tile e; summed over ranks by torchmetrics.

    Labels of -100 are ignored. A class is *claimed* by a tile to the degree that its tokens go there; a tile is *pure* to the
    degree that its tokens are of one class.

    Args:
        num_tiles, num_classes: the size of the matrix; independent of each other.

    Raises:
        ValueError: a size below 1; at update, a label outside [0, num_classes) that is not -100, or shapes that do not fit.
    """

    full_state_update = False
    count_EC: Tensor

    def __init__(self, num_tiles: int, num_classes: int) -> None:
        super().__init__()
        if num_tiles < 1 or num_classes < 1:
            raise ValueError(f"num_tiles ({num_tiles}) and num_classes ({num_classes}) must be >= 1")
        self.num_tiles, self.num_classes = num_tiles, num_classes
        self.add_state("count_EC", torch.zeros(num_tiles, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tile_idx: Tensor, label: Tensor) -> None:
        """Count assignments.

        Args:
            tile_idx: int64 [B, K] or [B, T, K], the chosen tiles. label: int64 [B], or [B, T] for a label per token.
        """
        if label.shape == tile_idx.shape[:1]:
            label = label.reshape(-1, *[1] * (tile_idx.dim() - 2)).expand(tile_idx.shape[:-1])
        if label.shape != tile_idx.shape[:-1]:
            raise ValueError(
                f"label {tuple(label.shape)} must have shape {tuple(tile_idx.shape[:-1])} or {tuple(tile_idx.shape[:1])}"
            )
        label_BTK = label.unsqueeze(-1).expand(tile_idx.shape)
        is_counted = label_BTK != IGNORED_LABEL
        counted_label, counted_tile = label_BTK[is_counted], tile_idx[is_counted]
        if counted_label.numel() == 0:
            return
        low, high = int(counted_label.min()), int(counted_label.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"label ({low if low < 0 else high}) must be in [0, num_classes ({self.num_classes})) or -100")
        cell = counted_tile * self.num_classes + counted_label
        self.count_EC += torch.bincount(cell, minlength=self.count_EC.numel()).reshape(self.count_EC.shape)

    def compute(self) -> Tensor:
        """Claim rates [E, C]: rate[e, c] = share of the tokens of class c that went to tile e; 0 for a class never seen."""
        return self.count_EC / self.count_EC.sum(dim=0, keepdim=True).clamp_min(1)

    def purity(self) -> Tensor:
        """[E]: share of the most frequent class among a tile's tokens; 0 for a tile that got none."""
        return self.count_EC.amax(dim=1) / self.count_EC.sum(dim=1).clamp_min(1)

    def dominant_class(self) -> Tensor:
        """int64 [E]: the most frequent class among a tile's tokens, ties to the lowest; -1 for a tile that got none."""
        is_empty = self.count_EC.sum(dim=1) == 0
        return torch.where(is_empty, -1, self.count_EC.argmax(dim=1))
