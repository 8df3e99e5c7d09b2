"""Memory while 20 million activations of width 576 are streamed in shuffled order: from a dump, and straight from a model.

Resident memory is read after every batch of 4096 tokens. What counts is by how much it ever exceeds what it was once the first
buffer of 65536 tokens had been served. The dump: one shard of random bf16 values, 65536 tokens or 76 MB, under as many names
(hard links) as there are tokens to stream, so that every value is read and copied, but the disk holds 76 MB instead of 23 GB.
The model: a table of vectors, so that the streaming itself is what takes memory; it reads batches of 64 ragged texts.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case_options import whole
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from turns import one_thread

from lightning_modules.errors import UserError
from trix.superposition.backends import CausalLMBackend, Site
from trix.superposition.config import DumpConfig
from trix.superposition.dump import ActivationDump, dump_layer_activations
from trix.superposition.dump.live import LiveActivations
from trix.superposition.dump.manifest import read_manifest, shard_path
from trix.superposition.dump.texts import TokenizedTexts

WIDTH, BATCH, SHARD_TOKENS, LONGEST = 576, 4096, 65536, 128
BYTES = 256  # tokens of the model
STATUS = Path("/proc/self/status")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=whole(1), default=20_000_000, help="tokens to stream (default: %(default)s)")


def run(tokens: int) -> dict[str, Any]:
    if not STATUS.exists():
        raise UserError(f"{STATUS} must exist: memory is read from it")
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        dump = linked_dump(Path(folder), tokens)
        from_disk = (batch["acts"] for batch in dump.shuffled(BATCH))
        from_model = live(tokens).shuffled(BATCH, seed=0, epoch=0)
        return {name: growth(stream, tokens) for name, stream in (("dump", from_disk), ("model", from_model))}


def growth(stream: Iterator[Tensor], tokens: int) -> dict[str, float]:
    """tokens: number of those streamed. first_mb: resident after the first buffer; growth_mb: how far it ever rises above."""
    first, most, streamed = 0, 0, 0
    for x_ND in islice(stream, -(-tokens // BATCH)):
        streamed += len(x_ND)
        resident = kilobytes()
        if streamed <= SHARD_TOKENS:
            first = max(first, resident)
        most = max(most, resident)
    return {"tokens": streamed, "first_mb": first / 1000, "growth_mb": (most - first) / 1000}


def kilobytes() -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))


class Table(CausalLMBackend):
    """A token is a byte, and its activation a row of a table."""

    has_sinks = False

    def __init__(self) -> None:
        model = nn.Sequential(nn.Embedding(BYTES, WIDTH), nn.Identity())
        model.requires_grad_(False)
        super().__init__(model)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.children())[1:]

    def tokenize(self, texts: Sequence[str], max_len: int) -> dict[str, Tensor]:
        rows = [torch.tensor(list(text.encode())[:max_len], dtype=torch.int64) for text in texts]
        masks = [torch.ones_like(row) for row in rows]
        padded = {"input_ids": rows, "attention_mask": masks}
        return {name: nn.utils.rnn.pad_sequence(parts, batch_first=True) for name, parts in padded.items()}

    def watch(self, site: Site, shape: tuple[int, int], note: Callable[[Tensor], None]) -> tuple[RemovableHandle, ...]:  # noqa: ARG002
        return (self.block(site.layer).register_forward_pre_hook(lambda _, inputs: note(inputs[0])),)

    def run(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        return self.model(input_ids)

    def generate(self, **kw: Any) -> Tensor:
        raise NotImplementedError

    def describe(self) -> str:
        return "table"


def live(tokens: int) -> LiveActivations:
    """Ragged texts of random tokens, as many as one pass of the stream needs."""
    draw = np.random.default_rng(0)
    length = draw.integers(1, LONGEST + 1, size=-(-2 * tokens // LONGEST) + 100 * 64)
    ids = draw.integers(0, BYTES, size=int(length.sum()), dtype=np.int32)
    texts = TokenizedTexts(ids, np.concatenate([[0], length.cumsum()]), np.zeros(len(length), dtype=np.int64))
    return LiveActivations(Table(), texts, Site(0, "resid_pre"), held_out=0.01)


def linked_dump(folder: Path, tokens: int) -> ActivationDump:
    """A dump of one shard, and then of more that are the same file."""
    import pandas as pd

    texts = ["".join(map(chr, row)) for row in np.random.default_rng(0).integers(32, 127, (SHARD_TOKENS // LONGEST, LONGEST))]
    frame = pd.DataFrame({"title": texts, "topic": 0})
    config = DumpConfig(layer=0, max_len=LONGEST, shard_tokens=SHARD_TOKENS)
    dump_layer_activations(frame, "title", "topic", Table(), config, folder)
    manifest = read_manifest(folder)
    number = -(-tokens // SHARD_TOKENS)
    for index in range(1, number):
        os.link(shard_path(folder, 0), shard_path(folder, index))
    manifest.model_copy(update={"shards": manifest.shards * number, "tokens": manifest.tokens * number}).write(folder)
    return ActivationDump(folder)


def table(results: dict[str, Any]) -> str:
    lines = ["| stream | tokens | MB after the first buffer | grows by MB | goal |", "|---|---|---|---|---|"]
    for name, found in results.items():
        lines.append(f"| {name} | {found['tokens']} | {found['first_mb']:.0f} | {found['growth_mb']:.1f} | <= 50 |")
    return "\n".join(lines)
