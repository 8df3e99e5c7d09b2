"""Which class goes to which tile, counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from trix.routing.facts import check_counts

IGNORED_LABEL = -100


class ClaimMatrix(Metric):
    """count[e, c] = number of assignments of tokens of class c to tile e; summed over ranks by torchmetrics.

    Labels of -100 and masked tokens are ignored. A class is *claimed* by a tile to the degree that its tokens go there; a tile
    is *pure* to the degree that its tokens are of one class.

    Args:
        num_tiles, num_classes: the size of the matrix; independent of each other. Without num_classes the matrix starts with
            one class and grows to the largest label seen, on all ranks alike.
        is_persistent: the counts stand in the state_dict. sync_on_compute: add up the counts of all ranks.

    Raises:
        ValueError: a size below 1; at update, a label outside [0, num_classes) that is not -100, or shapes that do not fit; at
            load_state_dict, counts of another size or below 0.
    """

    full_state_update = False
    count_EC: Tensor

    def __init__(
        self, num_tiles: int, num_classes: int | None = None, is_persistent: bool = False, sync_on_compute: bool = True
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.is_growing = num_classes is None
        num_classes = 1 if num_classes is None else num_classes
        if num_tiles < 1 or num_classes < 1:
            raise ValueError(f"num_tiles ({num_tiles}) and num_classes ({num_classes}) must be >= 1")
        self.num_tiles = num_tiles
        count_EC = torch.zeros(num_tiles, num_classes, dtype=torch.int64)
        self.add_state("count_EC", count_EC, dist_reduce_fx="sum", persistent=is_persistent)

    @property
    def num_classes(self) -> int:
        return self.count_EC.shape[1]

    def update(self, tile_idx: Tensor, label: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Count assignments.

        Args:
            tile_idx: int64 [B, K] or [B, T, K], the chosen tiles. label: int64 [B], or [B, T] for a label per token.
            mask: bool, the shape of tile_idx less its last dimension; False where a token is padding.
            weight: float, the shape of tile_idx; an assignment of weight 0 is not counted.
        """
        if label.shape == tile_idx.shape[:1]:
            label = label.reshape(-1, *[1] * (tile_idx.dim() - 2)).expand(tile_idx.shape[:-1])
        if label.shape != tile_idx.shape[:-1]:
            raise ValueError(
                f"label {tuple(label.shape)} must have shape {tuple(tile_idx.shape[:-1])} or {tuple(tile_idx.shape[:1])}"
            )
        is_counted = label != IGNORED_LABEL
        if mask is not None:
            is_counted = is_counted & mask
        counted_label, counted_tile = label[is_counted], tile_idx[is_counted]
        if counted_label.numel() == 0:
            return
        low, high = int(counted_label.min()), int(counted_label.max())
        if low < 0 or (high >= self.num_classes and not self.is_growing):
            allowed = ">= 0" if self.is_growing else f"in [0, num_classes ({self.num_classes}))"
            raise ValueError(f"label ({low if low < 0 else high}) must be {allowed} or {IGNORED_LABEL}")
        self._grow(high + 1)
        cell = counted_tile * self.num_classes + counted_label.unsqueeze(-1)
        cell = cell.flatten() if weight is None else cell[weight[is_counted] != 0]
        self.count_EC += torch.bincount(cell, minlength=self.count_EC.numel()).reshape(self.count_EC.shape)

    def _grow(self, num_classes: int) -> None:
        if num_classes > self.num_classes:
            fresh = self.count_EC.new_zeros(self.num_tiles, num_classes - self.num_classes)
            self.count_EC = torch.cat([self.count_EC, fresh], dim=1)

    def compute(self) -> Tensor:
        """Claim rates, float32 [E, C]: rate[e, c] = share of the tokens of class c that went to tile e; 0 for none seen."""
        return self.count_EC.float() / self.count_EC.sum(dim=0, keepdim=True).clamp_min(1)

    def purity(self) -> Tensor:
        """float32 [E]: share of the most frequent class among a tile's tokens; 0 for a tile that got none."""
        return self.count_EC.amax(dim=1).float() / self.count_EC.sum(dim=1).clamp_min(1)

    def dominant_class(self) -> Tensor:
        """int64 [E]: the most frequent class among a tile's tokens, ties to the lowest; -1 for a tile that got none."""
        is_empty = self.count_EC.sum(dim=1) == 0
        return torch.where(is_empty, -1, self.count_EC.argmax(dim=1))

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        # Ranks have met different classes; torchmetrics adds up matrices of one size.
        if should_sync and self.is_growing and torch.distributed.is_available() and torch.distributed.is_initialized():
            num_classes = torch.tensor(self.num_classes, device=self.count_EC.device)
            torch.distributed.all_reduce(num_classes, torch.distributed.ReduceOp.MAX, group=process_group)
            self._grow(int(num_classes))
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        count_EC = state_dict.get(prefix + "count_EC")
        if count_EC is not None:
            if count_EC.shape[0] != self.num_tiles or not (self.is_growing or count_EC.shape[1] == self.num_classes):
                raise ValueError(f"counts {tuple(count_EC.shape)} must have shape {(self.num_tiles, self.num_classes)}")
            check_counts("count_EC", count_EC)
            state_dict[prefix + "count_EC"] = count_EC.to(self.count_EC.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
