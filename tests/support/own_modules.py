"""Modules as users write them, around the layers of trix.nn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trix.functional.phase import resolvent_phase
from trix.functional.resolvent import Pair
from trix.nn import SparseLookupFFN, TriXFFN, TriXLinear

BATCH, TIME = torch.export.Dim("batch"), torch.export.Dim("time", max=12)
WIDTH = 16


class Own(nn.Module):
    """A module as a user writes one: a ternary projection, tiles in a residual, a norm, a float head."""

    def __init__(self, ffn: nn.Module | None = None) -> None:
        super().__init__()
        self.project = TriXLinear(10, WIDTH, bias=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = TriXFFN(WIDTH, num_tiles=4, top_k=2) if ffn is None else ffn
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.project(x))
        return self.head(h + self.ffn(h))


class LookupWrapper(nn.Module):
    """Makes a sparse lookup one of several modules in an nn.Sequential."""

    def __init__(self, layer: SparseLookupFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.project = TriXFFN(WIDTH, num_tiles=4), TriXLinear(WIDTH, 8)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> dict[str, Any]:
        return {"sum": self.ffn(left) + right * scale, "rest": [None, (self.project(right), "text"), 3]}


class SharedLayers(nn.Module):
    """A list of ternary layers, the first of them called twice, as are the tiles."""

    def __init__(self) -> None:
        super().__init__()
        shared = TriXLinear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([shared, TriXLinear(WIDTH, WIDTH), shared])
        self.ffn = TriXFFN(WIDTH, num_tiles=4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.ffn(x + self.ffn(x))


class Branches(nn.Module):
    """Inner graphs: each branch has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = TriXLinear(WIDTH, WIDTH), TriXLinear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x) - 1, (x,))


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))
        self.ffn = TriXFFN(WIDTH, num_tiles=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn((x @ x.mT + self.mask).softmax(-1) @ x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.tiles, self.hashed = TriXFFN(WIDTH, num_tiles=4), TriXFFN(WIDTH, num_tiles=4, routing="hash")

    def forward(self, token: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(token)
        return self.tiles(x, mask=mask) + self.hashed(x, token_idx=token), mask.sum(-1)


class ByPhase(nn.Module):
    """Tiles routed by the phase of the resolvent of single sites, 1 / (v - i eta)."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = TriXFFN(WIDTH, num_tiles=8, top_k=2, routing="scattering")

    def forward(self, x: Tensor) -> Tensor:
        v, eta = x[..., 0], 0.5 + x[..., 1].square()
        square = v * v + eta * eta
        return self.ffn(x, phase=resolvent_phase(Pair(v / square, eta / square)))


class Counting(nn.Module):
    """Its forward changes it, even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.layer = TriXLinear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x) + self.calls


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def answers(module: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return module.eval()(*inputs)


def assert_close(actual: np.ndarray, expected: Tensor) -> None:
    largest = max(float(expected.abs().max()), 1e-30)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4 * largest)
