"""Merging 2048 latents to 256 by the direction of their decoder rows, against random clusters: what is still explained.

By default a character model is trained, dumped and explained as docs/how-to/explain-a-model.md shows, with 2048 latents;
`--dump` and `--sae` name an existing dump and an existing run of `trix fit --config configs/sae.yaml` instead. Clusters:
average linkage by cosine; the same labels shuffled over the latents, so that clusters have the same sizes; and random clusters
of equal size. Each has its decoder refitted on the training part of the dump. Explained variance is measured on the
held-out part.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case_options import whole
from torch import Tensor

from lightning_modules.cli import main
from lightning_modules.errors import UserError
from lightning_modules.tasks import load_autoencoder
from trix.superposition.dump import ActivationDump
from trix.superposition.dump.reader import Part
from trix.superposition.merge import agglomerative_labels, cosine_dist_from_decoder, merge_sae
from trix.superposition.sae import SAE

CONFIGS = Path(__file__).parents[2] / "configs"
LATENTS, MERGED, HELD_OUT, BATCH = 2048, 256, 0.1, 4096
BY_DIRECTION, SAME_SIZES, EQUAL_SIZES = "by direction", "random, same sizes", "random, equal sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=whole(1), default=3, help="draws of random clusters (default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), default=500, help="steps of training of either model (default: %(default)s)")
    parser.add_argument("--dump", metavar="DIR", help="folder of a dump, with --sae")
    parser.add_argument("--sae", metavar="RUN", help="run folder of an autoencoder of this dump")


def run(seeds: int, steps: int, dump: str | None, sae: str | None) -> dict[str, Any]:
    if (dump is None) != (sae is None):
        raise UserError(f"--dump ({dump}) and --sae ({sae}) must be given together")
    with tempfile.TemporaryDirectory() as folder:
        if dump is None or sae is None:
            dump, sae = trained(Path(folder), steps)
        return compared(ActivationDump(dump), load_autoencoder(sae), seeds)


def trained(folder: Path, steps: int) -> tuple[str, str]:
    """A dump of a character model that is trained here, and the run of its autoencoder."""
    of_all = [f"--trainer.max_steps={steps}", f"--trainer.logger.init_args.save_dir={folder}"]
    of_all += [f"--trainer.val_check_interval={steps}", "--trainer.enable_progress_bar=false"]
    dump = folder / "acts" / "resid_pre.2"
    commands = (
        ["fit", "--config", str(CONFIGS / "char_lm.yaml"), *of_all],
        ["dump", str(folder / "char_lm"), "--site", "resid_pre.2", "--output", str(folder / "acts")],
        ["fit", "--config", str(CONFIGS / "sae.yaml"), f"--data.path={dump}", f"--model.autoencoder.k={LATENTS}", *of_all],
    )
    for command in commands:
        if main(command) != 0:
            raise UserError(f"trix {command[0]} must succeed")
    return str(dump), str(folder / "sae")


def compared(dump: ActivationDump, sae: SAE, seeds: int) -> dict[str, Any]:
    label_K = agglomerative_labels(cosine_dist_from_decoder(sae.dec.weight), MERGED)
    ways = {BY_DIRECTION: [label_K], SAME_SIZES: [], EQUAL_SIZES: []}
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        ways[SAME_SIZES].append(draw.permutation(label_K))
        ways[EQUAL_SIZES].append(draw.permutation(np.arange(sae.k) % MERGED))
    explained = {
        way: [explained_variance(merge_sae(sae, label, lambda: rows(dump, "training")), dump) for label in labels]
        for way, labels in ways.items()
    }
    return {
        "unmerged": explained_variance(sae, dump),
        "merged": explained,
        "largest_cluster": int(np.bincount(label_K).max()),
        "tokens": len(dump),
    }


def rows(dump: ActivationDump, part: Part) -> Iterator[Tensor]:
    return (batch["acts"] for batch in dump.shuffled(BATCH, part=part, held_out=HELD_OUT))


@torch.no_grad()
def explained_variance(sae: Any, dump: ActivationDump) -> float:
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2 over the held-out part, in float64."""
    x_ND = torch.cat(list(rows(dump, "validation")))
    x_hat_ND = torch.cat([sae(part_ND)[0] for part_ND in x_ND.split(BATCH)]).double()
    x_ND = x_ND.double()
    return float(1 - (x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(dim=0)).square().sum())


def table(results: dict[str, Any]) -> str:
    unmerged, merged = results["unmerged"], results["merged"]
    lines = ["| latents | explained variance | falls by |", "|---|---|---|", f"| all | {unmerged:.3f} | |"]
    for way, values in merged.items():
        mean = statistics.mean(values)
        lines.append(f"| merged {way} | {mean:.3f} ({min(values):.3f} to {max(values):.3f}) | {unmerged - mean:.3f} |")
    best = max(statistics.mean(merged[way]) for way in (SAME_SIZES, EQUAL_SIZES))
    lines.append(
        f"\nfalls by less than with the better of the random clusters: {merged[BY_DIRECTION][0] - best:.3f} (goal: >= 0.2)"
    )
    lines.append(f"largest cluster: {results['largest_cluster']} latents")
    return "\n".join(lines)
