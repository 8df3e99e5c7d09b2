"""A backend whose activations are known beforehand: each character has a vector of its own, whatever stands before it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trix.superposition.backends import CausalLMBackend, Site

LETTERS = "abcdefghijklmnopqrstuvwxyz "
WIDTH = 4


class PlantedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        vectors = torch.randn(len(LETTERS), WIDTH, generator=torch.Generator().manual_seed(0))
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        vectors[LETTERS.index("n")] = float("nan")
        vectors[LETTERS.index("i"), 2] = float("inf")
        vectors[LETTERS.index("s")] *= 11
        vectors[LETTERS.index("t")] *= 9
        self.embedding = nn.Embedding.from_pretrained(vectors)
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, id_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.embedding(id_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD


class PlantedBackend(CausalLMBackend):
    """n is NaN, i is infinite, s has 11 times the norm of the other letters, t 9 times. Two sites, which differ in sign."""

    sites: ClassVar[tuple[str, ...]] = ("resid_pre", "negative")
    has_sinks: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(PlantedModel())
        self.num_runs = 0

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)  # type: ignore[arg-type]

    def tokenize(self, texts: Sequence[str], max_len: int) -> dict[str, Tensor]:
        rows = [torch.tensor([LETTERS.index(letter) for letter in text[:max_len]], dtype=torch.int64) for text in texts]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }

    def watch(self, site: Site, shape: tuple[int, int], note: Callable[[Tensor], None]) -> tuple[RemovableHandle, ...]:
        sign = -1 if site.name == "negative" else 1
        return (self.block(site.layer).register_forward_pre_hook(lambda _, inputs: note(sign * inputs[0])),)

    def run(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        self.num_runs += 1
        logits_BTV: Tensor = self.model(input_ids) @ self.model.embedding.weight.nan_to_num().t()
        return logits_BTV

    def generate(self, **kw: Any) -> Tensor:
        raise NotImplementedError

    def describe(self) -> str:
        return "planted"


class PlantedWithSinks(PlantedBackend):
    has_sinks: ClassVar[bool] = True
