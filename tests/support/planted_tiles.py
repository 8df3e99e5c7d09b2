"""A regression that needs a tile for each of its parts, learned by one layer that may start with all its tiles alike."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trix.evolution import tile_parameters
from trix.nn import TriXFFN
from trix.outputs import RoutingInfo

NUM_PARTS, WIDTH = 8, 16


class Parts(IterableDataset[tuple[Tensor, Tensor]]):
    """y = A_c x for tokens x around the centre of a random part c."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.centre_CD = torch.randn(NUM_PARTS, WIDTH, generator=self.generator)
        self.map_CDD = torch.randn(NUM_PARTS, WIDTH, WIDTH, generator=self.generator) / WIDTH**0.5

    def batch(self, num_tokens: int = 128) -> tuple[Tensor, Tensor]:
        part_T = torch.randint(0, NUM_PARTS, (num_tokens,), generator=self.generator)
        x_TD = self.centre_CD[part_T] + 0.3 * torch.randn(num_tokens, WIDTH, generator=self.generator)
        return x_TD, torch.einsum("tij,tj->ti", self.map_CDD[part_T], x_TD)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.batch()

    def loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self, batch_size=None)


class OneLayer(L.LightningModule):
    """A TriXFFN alone, under Adam. ``is_planted``: all tiles begin as copies of the first."""

    reports_routing = True

    def __init__(self, seed: int, is_planted: bool, lr: float = 2e-3, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lr, self.losses = lr, list[float]()
        self.ffn = TriXFFN(WIDTH, NUM_PARTS, **({"routing": "explicit", "balance_rate": 0.03} | settings))
        if is_planted:
            plant_duplicates(self.ffn)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | dict[str, RoutingInfo]]:
        y, info, aux = self.ffn(batch[0], return_routing=True)
        loss = F.mse_loss(y, batch[1])
        self.losses.append(float(loss.detach()))
        return {"loss": loss + aux["total_aux"], "routing": {"layer_0": info}}

    @torch.no_grad()
    def error(self, parts: Parts) -> float:
        x, y = parts.batch(2000)
        was_training = self.ffn.training
        error = F.mse_loss(self.ffn.eval()(x), y).item()
        self.ffn.train(was_training)
        return error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def plant_duplicates(ffn: TriXFFN, num_duplicates: int = NUM_PARTS - 1) -> None:
    with torch.no_grad():
        for parameter in tile_parameters(ffn):
            parameter[1 : 1 + num_duplicates] = parameter[0].clone()
