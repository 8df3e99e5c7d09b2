"""Validation loss against the mean number of tiles per token, where the confidence of the routing chooses it.

A character language model as in char_lm_quality, trained with one or two tiles per token (max_k 2, tiles of half the width,
confidence_threshold 0.3), is then measured with other thresholds: 0 takes one tile for every token, infinity always two.
"""

import argparse
import math
import statistics
from typing import TYPE_CHECKING, Any

from cases import char_lm_quality as quality

from lightning_modules.data.text import TextDataModule
from trix.nn import FFNConfig, TriXFFN, routed_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINED_THRESHOLD = 0.3
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, TRAINED_THRESHOLD, 0.5, 1.0, math.inf)
FFN = FFNConfig(
    num_tiles=quality.NUM_TILES,
    d_ff=quality.NUM_TILES * quality.D_MODEL // 2,
    max_k=2,
    confidence_threshold=TRAINED_THRESHOLD,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")


def run(steps: int, seeds: list[int], lr: float) -> list[dict[str, Any]]:
    runs: dict[float, list[dict[str, Any]]] = {threshold: [] for threshold in THRESHOLDS}
    for seed in seeds:
        data = TextDataModule("tinyshakespeare", seed=seed, batches_per_epoch=steps)
        model, _ = quality.train(FFN, data, seed, steps, lr, f"adaptive k, seed {seed}")
        for threshold in THRESHOLDS:
            for layer in routed_layers(model):
                assert isinstance(layer, TriXFFN)
                layer.router.confidence_threshold = threshold
            runs[threshold].append({"seed": seed, **quality.validate(model, data)})
    return [
        {
            "confidence_threshold": str(threshold),  # JSON has no infinity
            "is_trained_threshold": threshold == TRAINED_THRESHOLD,
            "mean_k": statistics.mean(run["mean_k"] for run in of_threshold),
            "loss_nats_mean": statistics.mean(run["loss_nats"] for run in of_threshold),
            "loss_nats_spread": max(run["loss_nats"] for run in of_threshold) - min(run["loss_nats"] for run in of_threshold),
            "runs": of_threshold,
        }
        for threshold, of_threshold in runs.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| confidence threshold | tiles per token | validation nats, mean (max - min) |", "|---|---|---|"]
    for result in results:
        trained = " (trained)" if result["is_trained_threshold"] else ""
        rows.append(
            f"| {result['confidence_threshold']}{trained} | {result['mean_k']:.2f} "
            f"| {result['loss_nats_mean']:.3f} ({result['loss_nats_spread']:.3f}) |"
        )
    return "\n".join(rows)


def figure(results: list[dict[str, Any]]) -> "Figure":
    """Loss against mean k, a line for each seed."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.5, 4.0), layout="constrained")
    axes = drawn.subplots()
    for index, first in enumerate(results[0]["runs"]):
        runs = [result["runs"][index] for result in results]
        axes.plot(
            [run["mean_k"] for run in runs], [run["loss_nats"] for run in runs], marker="o", label=f"seed {first['seed']}"
        )
    trained = next(result for result in results if result["is_trained_threshold"])
    axes.axvline(trained["mean_k"], color="grey", linestyle=":", label="threshold of the training")
    axes.set(xlabel="tiles per token, mean", ylabel="validation nats per character", title="Adaptive k")
    axes.legend()
    return drawn
