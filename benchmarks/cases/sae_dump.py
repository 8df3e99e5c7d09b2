"""A dump of the middle layer, against a full run of the model that keeps all hidden states and logits; and its memory.

Texts: translated messages of Django, of 4 to 128 characters and in random order. Model: a character model of width 256 with 8
blocks and random weights, or that of `--model`, a folder of Hugging Face. Contestants: `dump_layer_activations`, which takes
the digest of the model, sorts texts by length, stops at the layer, leaves out padding, and writes bf16 with five columns; and
what is done without it: batches in the order of the texts, padded to the longest of each, a full run that keeps the input of
every block and the logits, and the rows of the middle layer in float32, a .npy file for each batch. All take turns; the ratio
is the median over the turns of its CPU time over that of the dump.

Memory: in a process of its own, by how much the peak during a dump of several shards exceeds the peak while the largest batch
alone was run up to the middle layer, in shards of 65536 tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from case_options import whole
from torch import Tensor
from turns import interleaved, one_thread

from lightning_modules.data.translations import load_translations
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.superposition.backends import CausalLMBackend, HFCausalLM, Site, TriXBackend, io_store
from trix.superposition.config import DumpConfig
from trix.superposition.dump import ActivationDump, dump_layer_activations

if TYPE_CHECKING:
    import pandas as pd

BENCHMARKS = Path(__file__).parents[1]
WIDTH, LAYERS, HEADS = 256, 8, 8
SHORTEST, LONGEST, BATCH = 4, 128, 64
MEMORY_TEXTS, SHARD_TOKENS = 10_000, 65_536
DUMP, FULL = "dump", "full run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=whole(1), default=5, help="turns (default: %(default)s)")
    parser.add_argument("--texts", type=whole(2), default=1024, help="number of texts (default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a model of Hugging Face (default: a character model)")


def run(repeats: int, texts: int, model: str | None) -> dict[str, Any]:
    frame = titles(texts)
    backend = make_backend(frame, model)
    layer = backend.num_layers // 2
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        ways = contestants(backend, frame, layer, Path(folder))
        if repeats > 1:
            interleaved(ways, 1)
        seconds = interleaved(ways, repeats)
        agreement = largest_difference(Path(folder))
        dump = ActivationDump(Path(folder) / "dump")
    return {
        "model": "characters" if model is None else Path(model).name,
        "layer": layer,
        "tokens": len(dump),
        "padding_of_full_run": padded_share(backend, frame),
        "seconds": seconds,
        "ratios": [full / ours for full, ours in zip(seconds[FULL], seconds[DUMP], strict=True)],
        "largest_difference": agreement,
        "memory_in_shards": memory(model),
    }


def titles(number: int) -> "pd.DataFrame":
    import pandas as pd

    texts = [translation.text for translation in load_translations(SHORTEST) if translation.text.isascii()]
    drawn = np.random.default_rng(0).choice(len(texts), number, replace=number > len(texts))
    return pd.DataFrame({"title": [texts[index] for index in drawn], "topic": 0})


def make_backend(frame: "pd.DataFrame", model: str | None) -> CausalLMBackend:
    if model is not None:
        return HFCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    vocabulary = "".join(sorted(set("".join(frame["title"]))))
    config = LanguageModelConfig(
        d_model=WIDTH, num_layers=LAYERS, n_heads=HEADS, context_length=LONGEST, ffn=FFNConfig(num_tiles=16, route_on="hidden")
    )
    return TriXBackend(LanguageModel(len(vocabulary), config), vocabulary)


def contestants(backend: CausalLMBackend, frame: "pd.DataFrame", layer: int, folder: Path) -> dict[str, Callable[[], None]]:
    """Each writes a folder anew."""
    config = DumpConfig(layer=layer, max_len=LONGEST, batch_size=BATCH, drop_sinks=False)

    def dump() -> None:
        _empty(folder / "dump")
        dump_layer_activations(frame, "title", "topic", backend, config, folder / "dump")

    def full() -> None:
        _empty(folder / "full")
        for first in range(0, len(frame), BATCH):
            tokens = backend.tokenize(frame["title"].tolist()[first : first + BATCH], LONGEST)
            states, _ = full_run(backend, tokens)
            rows_ND = states[layer][tokens["attention_mask"].bool()].float()
            io_store.save_npy(folder / "full" / f"{first:06d}_acts.npy", rows_ND.cpu().numpy())

    return {DUMP: dump, FULL: full}


@torch.no_grad()
def full_run(backend: CausalLMBackend, tokens: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The input of every block, and the logits."""
    ids_BT, mask_BT = tokens["input_ids"], tokens["attention_mask"].bool()
    states: list[Tensor] = []
    handles = [
        handle
        for layer in range(backend.num_layers)
        for handle in backend.watch(Site(layer, "resid_pre"), (ids_BT.shape[0], ids_BT.shape[1]), states.append)
    ]
    try:
        logits = backend.run(ids_BT, None if bool(mask_BT.all()) else mask_BT)
    finally:
        for handle in handles:
            handle.remove()
    return states, logits


def largest_difference(folder: Path) -> float:
    """Between the two, over the largest activation: the rows of the dump are put into the order of the texts."""
    dump = ActivationDump(folder / "dump")
    place_N = np.lexsort((dump.column("position").numpy(), dump.column("titleidx").numpy()))
    ours_ND = np.concatenate([io_store.read_column(path, "acts").float().numpy() for path in dump.paths])[place_N]
    theirs_ND = np.concatenate([np.load(path) for path in sorted((folder / "full").glob("*.npy"))])
    return float(np.abs(ours_ND - theirs_ND).max() / np.abs(theirs_ND).max())


def padded_share(backend: CausalLMBackend, frame: "pd.DataFrame") -> float:
    """The share of positions that are padding, with the texts in their own order."""
    texts = frame["title"].tolist()
    masks = [backend.tokenize(texts[first : first + BATCH], LONGEST)["attention_mask"] for first in range(0, len(texts), BATCH)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def memory(model: str | None) -> float | None:
    """None where the system does not say how much memory a process has had."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "cases.sae_dump", json.dumps([MEMORY_TEXTS, SHARD_TOKENS, model])]
    finished = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr)
    return float(finished.stdout.splitlines()[-1])


def _print_memory(texts: int, shard_tokens: int, model: str | None) -> None:
    torch.set_num_threads(1)
    frame = titles(texts)
    backend = make_backend(frame, model)
    layer = backend.num_layers // 2
    tokens = backend.tokenize(frame["title"].tolist(), LONGEST)
    by_length = tokens["attention_mask"].sum(dim=1).argsort()
    largest = {name: value[by_length[-BATCH:]].clone() for name, value in tokens.items()}
    config = DumpConfig(layer=layer, max_len=LONGEST, batch_size=BATCH, shard_tokens=shard_tokens)
    del tokens
    with tempfile.TemporaryDirectory() as folder:
        write = partial(dump_layer_activations, text_col="title", label_col="topic", backend=backend, cfg=config)
        write(frame.head(2), out_dir=f"{folder}/first")  # what is loaded on first use is no part of it
        Path("/proc/self/clear_refs").write_text("5")
        backend.forward_hidden(**largest, layer=layer)
        before = _kilobytes("VmHWM")
        write(frame, out_dir=f"{folder}/whole")
        grown = _kilobytes("VmHWM") - before
        shard = ActivationDump(f"{folder}/whole").paths[0].stat().st_size
    print(1024 * grown / shard)


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _empty(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def table(results: dict[str, Any]) -> str:
    lines = [
        f"model: {results['model']}, layer {results['layer']}, {results['tokens']} tokens; padding in the full run: "
        f"{results['padding_of_full_run']:.0%} of the positions",
        "",
        "| way | CPU s | x dump | goal |",
        "|---|---|---|---|",
    ]
    for name, ratio in ((DUMP, 1.0), (FULL, statistics.median(results["ratios"]))):
        goal = ">= 4" if name == FULL else ""
        lines.append(f"| {name} | {statistics.median(results['seconds'][name]):.2f} | {ratio:.2f} | {goal} |")
    lines.append(f"\nlargest difference of an activation, over the largest one: {results['largest_difference']:.1e} (bf16)")
    if results["memory_in_shards"] is not None:
        lines.append(
            f"memory of a dump beyond the model and its largest batch: {results['memory_in_shards']:.2f} shards (goal: 2)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    _print_memory(*json.loads(sys.argv[1]))
