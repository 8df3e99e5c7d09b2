"""Validation loss of a character language model by what decides about the tile: the character, its context, a hash, a gate.

Text: TinyShakespeare (from TRIX_DATA_DIR, or downloaded), or --path; windows of 128 characters, batches of 16. Everything but
the feed-forward layer is the same: d_model 128, 4 layers, 4 heads, AdamW with cosine decay. Contestants: dense layers of width
d, 4d and 16d; a hash of the character with 16 and 64 tiles, and of the character and the one before it with 64; a learned gate
that reads the hidden state, or the code of both characters; signatures that read the hidden state, the embedding, or the code:
as drawn, or learned. Tiles have width d, and one serves each token: a quarter of dense 4d's active feed-forward compute. With
adaptive k, a token that is not sure of its tile gets two; load, churn and information are of the first.

Further contestants look for better signatures on the code than those that are drawn. Learned until 30 % of the steps, then
frozen. Learned with hysteresis: a value in use changes only after the learned one has asked for the same other value in 50
consecutive steps. Learned in a short run of a quarter of the steps, and given to a fresh model, where they are frozen
(StableMoE). Clusters: before training, pairs of characters are clustered by the characters that follow them, and each cluster
gets a tile. Grown: 32 drawn ones are in use at first; in the first half of training the tile with the highest summed loss is
split, again and again, until there are 64. All but the first are in signature_ways.py.

A step: its CPU time on one thread over that of dense 4d; all contestants take turns, on this machine. To reach: CPU time until
the loss on an eighth of the validation text, interpolated between TIMES_WATCHED points, falls to the last one of dense 4d with
the same seed, over the time of all steps of dense 4d. The short run, the clustering and the splits count; each run measures
them in steps of its own, so that runs that were kept may come from other machines. Active: parameters that a token meets; with
adaptive k, the mean. Churn: % of 2048 validation characters whose tile is another one than 50 steps before, mean of the
layers, median of the second half of training. I(tile; character) and I(tile; one before | character): in bits, of the
validation text, mean of the layers. Load: of the tile that most characters go to, over the mean; the worst layer. Dead: tiles
without any character, in all layers.
--resume keeps the runs that a stopped one had finished.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import code_hash
import numpy as np
import signature_ways
import torch
import torch.nn.functional as F
from case_options import check_distinct, positive, seed_number, share, whole
from cases.char_lm_quality import sizes, take_step, validate
from kept_runs import RESULTS, kept_or_run, put_aside
from rich.progress import track
from torch import Tensor
from turns import interleaved, one_thread

from lightning_modules.comparison import paired_significance
from lightning_modules.data.text import TextDataModule
from lightning_modules.machine import cpu_name
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig, routed_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORPUS = "tinyshakespeare"
# The recurrent ones are twice as wide as the model, as those that are best in CASE=bk_quality.
MIXERS: dict[str, dict[str, Any]] = {"attention": {}, "resolvent": {"expand": 2}, "ssd": {"expand": 2}}
D_MODEL = 128
TIMES_WATCHED = 20
CHURN_EVERY = 50  # steps
FREEZE_AT = 0.3  # of the steps
PATIENCE = 50  # steps
SHORT_RUN = 0.25  # of the steps
CLUSTERED = 512  # batches, 2^20 characters
ROUNDS, STEPS_A_TURN = 7, 5  # of the measurement of a step's time, after two rounds that do not count
DENSE, CHARACTER, PAIR, DRAWN = (
    "dense 4d",
    "hash of the character, 64",
    "hash of the pair, 64",
    "signatures on context, as drawn",
)
LEARNED, LEARNED_THEN_FROZEN = "signatures on context, learned", "signatures on context, learned then frozen"
DIVERSE, ADAPTIVE = f"{LEARNED}, diversity 0.1", f"{DRAWN}, adaptive k"
HYSTERESIS, SHORT = f"{LEARNED} with hysteresis", f"{LEARNED} in a short run"
CLUSTERS, GROWN = "signatures on context, clusters of pairs", "signatures on context, grown from 32"
_context = {"num_tiles": 64, "route_on": "context", "balance_rate": 0.0}
LAYERS = {
    "dense d": FFNConfig("dense", d_ff=D_MODEL),
    DENSE: FFNConfig("dense", d_ff=4 * D_MODEL),
    "dense 16d": FFNConfig("dense", d_ff=16 * D_MODEL),
    "hash of the character, 16": FFNConfig(num_tiles=16, routing="hash"),
    CHARACTER: FFNConfig(num_tiles=64, routing="hash"),
    PAIR: FFNConfig(**_context, routing=f"{code_hash.__name__}.CodeHash"),
    "gate on hidden": FFNConfig(num_tiles=64, route_on="hidden", routing="learned", balance_rate=0.0),
    "gate on context": FFNConfig(**_context, routing="learned"),
    "signatures on hidden": FFNConfig(num_tiles=64, route_on="hidden", balance_rate=0.0),
    "signatures on embedding": FFNConfig(num_tiles=64, balance_rate=0.0),
    DRAWN: FFNConfig(num_tiles=64, route_on="context"),  # the default of language models
    "signatures on 3 characters, as drawn": FFNConfig(num_tiles=64, route_on="context", context_tokens=3),
    ADAPTIVE: FFNConfig(num_tiles=64, route_on="context", max_k=2),
    LEARNED: FFNConfig(**_context, signatures="learned"),
    DIVERSE: FFNConfig(**_context, signatures="learned", diversity_weight=0.1),
    LEARNED_THEN_FROZEN: FFNConfig(**_context, signatures="learned"),
    HYSTERESIS: FFNConfig(
        **_context, routing=f"{signature_ways.__name__}.HysteresisRouter", routing_args={"patience": PATIENCE}
    ),
    SHORT: FFNConfig(num_tiles=64, route_on="context"),
    CLUSTERS: FFNConfig(num_tiles=64, route_on="context"),
    GROWN: FFNConfig(**_context, signatures="learned"),
}
QUESTIONS = (
    *((DRAWN, other) for other in (DENSE, CHARACTER, PAIR)),
    *((way, DRAWN) for way in (LEARNED, LEARNED_THEN_FROZEN, HYSTERESIS, SHORT, CLUSTERS, GROWN, ADAPTIVE)),
    (DIVERSE, LEARNED),
)
FINISHED = RESULTS / "context_routing.runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), nargs="+", default=[600, 3000], help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: %(default)s")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=["attention", "resolvent"], help="default: %(default)s")
    parser.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--dropout", type=share, default=0.0, help="after mixer and feed-forward layer (default: %(default)s)")
    parser.add_argument("--path", help="another text")
    parser.add_argument("--only", nargs="+", choices=LAYERS, metavar="LAYER", help=f"some of: {'; '.join(LAYERS)}")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(
    steps: list[int],
    seeds: list[int],
    mixers: list[str],
    lr: float,
    dropout: float,
    path: str | None,
    only: list[str] | None,
    resume: bool,
) -> list[dict[str, Any]]:
    names = only or list(LAYERS)
    check_distinct(steps=steps, seeds=seeds, mixers=mixers, only=names)
    TextDataModule(CORPUS, path)  # where it cannot be had, that is told now
    if not resume:
        put_aside(FINISHED)
    with one_thread():
        # Seeds outside, layers inside: a change of the machine's speed meets all layers alike.
        results = {
            (mixer, num_steps, seed, name): finished_or_run(config_of(name, mixer, dropout), name, num_steps, seed, lr, path)
            for mixer in mixers
            for num_steps in steps
            for seed in seeds
            for name in names
        }
        step_ms = {
            mixer: time_of_steps({name: config_of(name, mixer, dropout) for name in names}, lr, path) for mixer in mixers
        }
    return [
        summary(name, mixer, num_steps, {seed: results[mixer, num_steps, seed, name] for seed in seeds}, step_ms[mixer][name])
        for mixer in mixers
        for num_steps in steps
        for name in names
    ]


def config_of(name: str, mixer: str, dropout: float = 0.0) -> LanguageModelConfig:
    return LanguageModelConfig(D_MODEL, mixer=mixer, mixer_args=MIXERS[mixer], dropout=dropout, ffn=LAYERS[name])


def finished_or_run(
    config: LanguageModelConfig, name: str, steps: int, seed: int, lr: float, path: str | None
) -> dict[str, Any]:
    key = {"layer": name, "config": asdict(config), "seed": seed, "steps": steps, "lr": lr}
    key["text_sha256"] = TextDataModule(CORPUS, path).text_sha256
    return kept_or_run(FINISHED, key, lambda: measure(config, name, steps, seed, lr, path))


def measure(config: LanguageModelConfig, name: str, steps: int, seed: int, lr: float, path: str | None) -> dict[str, Any]:
    data = TextDataModule(CORPUS, path, seed=seed, batches_per_epoch=steps)
    torch.manual_seed(seed)
    model = LanguageModel(data.vocab_size, config)
    windows = [*zip(*data.val_dataloader(), strict=True)]
    token_WT, target_WT = (torch.cat(part) for part in windows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.thread_time()
    prepare(name, model, data, lr)
    growth = signature_ways.Growth(model, optimizer, steps) if name == GROWN else None
    extra_seconds, step_seconds = time.thread_time() - start, []
    curve, churn = [], []
    tiles = tiles_of(model, token_WT[:16])
    what = f"{name}, {config.mixer}, {steps} steps, seed {seed}"
    for step, (token_BT, target_BT) in enumerate(track(data.train_dataloader(), what, total=steps), start=1):
        if name == LEARNED_THEN_FROZEN and step == round(FREEZE_AT * steps):
            freeze_all(model)
        start = time.thread_time()
        take_step(model, optimizer, token_BT, target_BT)
        schedule.step()
        step_seconds.append(time.thread_time() - start)
        if growth is not None:
            start = time.thread_time()
            growth.after_step(step, token_BT, target_BT)
            extra_seconds += time.thread_time() - start
        if step % max(steps // TIMES_WATCHED, 1) == 0 or step == steps:
            curve.append([step, mean_loss(model, token_WT[::8], target_WT[::8])])
        if step % CHURN_EVERY == 0 and tiles is not None:
            before, tiles = tiles, tiles_of(model, token_WT[:16])
            assert tiles is not None
            churn.append((tiles != before).float().mean().item())
    figures = {"seed": seed, "loss_nats": mean_loss(model, token_WT, target_WT), "curve": curve}
    figures |= {"cpu": cpu_name(), "text": path or CORPUS, "text_sha256": data.text_sha256}
    figures |= {"cpu_seconds": sum(step_seconds), "extra_steps": extra_seconds / statistics.median(step_seconds)}
    mean_k = validate(model, data)["mean_k"] if name == ADAPTIVE else 1.0
    return figures | sizes(model, mean_k) | routing_figures(model, token_WT) | {"churn": churn}


def time_of_steps(configs: dict[str, LanguageModelConfig], lr: float, path: str | None) -> dict[str, list[float]]:
    """CPU milliseconds of a step of training, of each contestant in each round; they take turns."""
    data = TextDataModule(CORPUS, path, batches_per_epoch=STEPS_A_TURN)
    batches = [*data.train_dataloader()]

    def turn_of(config: LanguageModelConfig) -> Callable[[], None]:
        torch.manual_seed(0)
        model = LanguageModel(data.vocab_size, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)

        def turn() -> None:
            for token_BT, target_BT in batches:
                take_step(model, optimizer, token_BT, target_BT)

        return turn

    turns = {name: turn_of(config) for name, config in configs.items()}
    interleaved(turns, 2)
    seconds = interleaved(turns, ROUNDS)
    return {name: [1000 * turn / STEPS_A_TURN for turn in of_name] for name, of_name in seconds.items()}


def prepare(name: str, model: LanguageModel, data: TextDataModule, lr: float) -> None:
    """What a contestant does to its signatures before training."""
    if name == SHORT:
        batches = [*islice(data.train_dataloader(), max(round(SHORT_RUN * data.batches_per_epoch), 1))]
        config = replace(model.config, ffn=LAYERS[LEARNED])
        found = signature_ways.learned_signatures(
            config, data.vocab_size, batches, data.seed, lr, f"short run, seed {data.seed}"
        )
        signature_ways.set_signatures(model, found, "short run")
    elif name == CLUSTERS:
        batches = [*islice(data.train_dataloader(), CLUSTERED)]
        token_BT = torch.cat([torch.cat([token_BT, target_BT[:, -1:]], dim=1) for token_BT, target_BT in batches])
        signature_ways.set_signatures(model, signature_ways.cluster_signatures(model, token_BT, data.seed), "clusters")


def freeze_all(model: LanguageModel) -> None:
    for layer in routed_layers(model):
        layer.freeze_all_signatures()


@torch.no_grad()
def mean_loss(model: LanguageModel, token_WT: Tensor, target_WT: Tensor) -> float:
    model.eval()
    pairs = zip(token_WT.split(32), target_WT.split(32), strict=True)
    losses = [F.cross_entropy(model(token).mT, target, reduction="none") for token, target in pairs]
    model.train()
    return torch.cat(losses).mean().item()


@torch.no_grad()
def tiles_of(model: LanguageModel, token_WT: Tensor) -> Tensor | None:
    """[layers, W, T]; None without tiles."""
    model.eval()
    parts = [[info["tile_idx"][..., 0] for info in model(token, return_routing=True)[1]] for token in token_WT.split(32)]
    model.train()
    return torch.stack([torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]) if parts[0] else None


def routing_figures(model: LanguageModel, token_WT: Tensor) -> dict[str, Any]:
    tiles = tiles_of(model, token_WT)
    if tiles is None:
        return {}
    layers = list(routed_layers(model))
    loads = [np.bincount(of_layer.flatten(), minlength=layer.num_tiles) for layer, of_layer in zip(layers, tiles, strict=True)]
    token, before = token_WT[:, 1:].flatten().numpy(), token_WT[:, :-1].flatten().numpy()
    of_tokens = [of_layer[:, 1:].flatten().numpy() for of_layer in tiles]
    return {
        "bits_of_token": statistics.fmean(information(tile, token) for tile in of_tokens),
        "bits_of_one_before": statistics.fmean(
            information(tile + 1000 * token, before) - information(token, before) for tile in of_tokens
        ),
        "max_over_mean_load": float(max(load.max() / load.mean() for load in loads)),
        "num_dead": int(sum((load == 0).sum() for load in loads)),
        "diversity": min((layer.get_signature_diversity() for layer in layers), default=None),
    }


def information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) in bits, of two series of numbers >= 0."""
    return entropy(a) + entropy(b) - entropy(a.astype(np.int64) * (int(b.max()) + 1) + b)


def entropy(value: np.ndarray) -> float:
    _, count = np.unique(value, return_counts=True)
    share = count / count.sum()
    return float(-(share * np.log2(share)).sum())


def summary(name: str, mixer: str, steps: int, runs: dict[int, dict[str, Any]], step_ms: list[float]) -> dict[str, Any]:
    losses = [of_seed["loss_nats"] for of_seed in runs.values()]
    return {
        "layer": name,
        "mixer": mixer,
        "steps": steps,
        "config": asdict(LAYERS[name]),
        "loss_nats_mean": statistics.fmean(losses),
        "loss_nats_spread": max(losses) - min(losses),
        "step_ms": step_ms,
        "runs": list(runs.values()),
    }


def steps_to_reach(curve: list[list[float]], loss: float) -> float | None:
    """Steps after which a curve of (step, loss) is at or below a loss for the first time; None: never."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (from_step, from_loss), (to_step, to_loss) in pairwise(curve):
        if to_loss <= loss:
            return from_step + (to_step - from_step) * (from_loss - loss) / (from_loss - to_loss)
    return None


def table(results: list[dict[str, Any]]) -> str:
    row_of = {(row["mixer"], row["steps"], row["layer"]): row for row in results}
    lines = []
    for mixer, steps in dict.fromkeys((row["mixer"], row["steps"]) for row in results):
        for ours, other in QUESTIONS:
            rows = [row_of.get((mixer, steps, name)) for name in (ours, other)]
            if rows[0] is not None and rows[1] is not None and len(rows[0]["runs"]) > 1:
                found = paired_significance(
                    *([run["loss_nats"] for run in row["runs"]] for row in (rows[1], rows[0])), min_pairs=2
                )
                low, high = found.confidence_interval
                verdict = "LOSES to" if low > 0 else "is better than" if high < 0 else "is not shown to differ from"
                said = f"{found.mean_difference:+.4f} ({low:+.4f} to {high:+.4f})"
                lines.append((low <= 0, f"- {ours} {verdict} {other} ({mixer}, {steps} steps): {said}"))
    said_lines = [line for _, line in sorted(lines, key=lambda line: line[0])]
    said_lines += [
        "",
        "| mixer | steps | feed-forward layer | nats, mean (max - min) | a step / dense 4d's | to reach dense 4d / its time "
        "| active | parameters | churn, % | I(tile; character) | I(tile; one before \\| character) | load | dead | diversity |",
        "|---" * 14 + "|",
    ]
    for row in sorted(results, key=lambda row: (row["mixer"], row["steps"], row["loss_nats_mean"])):
        runs = row["runs"]
        said_lines.append(
            f"| {row['mixer']} | {row['steps']} | {row['layer']} | {row['loss_nats_mean']:.3f} ({row['loss_nats_spread']:.3f}) "
            f"| {' | '.join(shares_of_dense(row, row_of.get((row['mixer'], row['steps'], DENSE))))} "
            f"| {runs[0]['active_parameters']:,} | {runs[0]['parameters']:,} | {routing_cells(runs)} |"
        )
    return "\n".join(said_lines)


def shares_of_dense(row: dict[str, Any], dense: dict[str, Any] | None) -> tuple[str, str]:
    """A step's CPU time over that of dense 4d, and the time until its last loss over its time.

    Median of the turns; mean of the seeds, "never" if one does not get there. Empty without dense 4d.
    """
    if dense is None:
        return "", ""
    step = statistics.median(ours / other for ours, other in zip(row["step_ms"], dense["step_ms"], strict=True))
    shares = []
    for ours, other in zip(row["runs"], dense["runs"], strict=True):
        all_steps, goal = other["curve"][-1]
        reached = steps_to_reach(ours["curve"], goal)
        if reached is None:
            return f"{step:.2f}", "never"
        shares.append(step * (ours["extra_steps"] + reached) / all_steps)
    return f"{step:.2f}", f"{statistics.fmean(shares):.2f}"


def routing_cells(runs: list[dict[str, Any]]) -> str:
    if "bits_of_token" not in runs[0]:
        return " | " * 5
    means = {name: statistics.fmean(run[name] for run in runs) for name in ("bits_of_token", "bits_of_one_before", "diversity")}
    churn = [100 * statistics.median(run["churn"][len(run["churn"]) // 2 :]) for run in runs if run["churn"]]
    cells = [f"{statistics.fmean(churn):.1f}" if churn else ""]
    cells += [f"{means['bits_of_token']:.2f}", f"{means['bits_of_one_before']:.2f}"]
    cells += [f"{max(run['max_over_mean_load'] for run in runs):.1f}", f"{max(run['num_dead'] for run in runs)}"]
    return " | ".join([*cells, f"{means['diversity']:.2f}"])


def figure(results: list[dict[str, Any]]) -> "Figure":
    """Loss on an eighth of the validation text by CPU time, a panel for each mixer and number of steps; the first seed."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["mixer"], row["steps"]) for row in results))
    drawn = Figure(figsize=(8, 4.5 * len(panels)), layout="constrained")
    for axes, (mixer, steps) in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for row in results:
            if (row["mixer"], row["steps"]) == (mixer, steps):
                style = "-" if "context" in row["layer"] else "--"
                run, step_s = row["runs"][0], statistics.median(row["step_ms"]) / 1000
                seconds = [step_s * (run["extra_steps"] + step) for step, _ in run["curve"]]
                axes.plot(seconds, [loss for _, loss in run["curve"]], style, label=row["layer"])
        axes.set(xlabel="CPU seconds of training", ylabel="validation nats per character", title=f"{mixer}, {steps} steps")
        axes.set_ylim(top=min(3.0, axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return drawn
