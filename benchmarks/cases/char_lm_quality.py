"""Validation loss of a character language model under different feed-forward layers, at equal steps and tokens.

Text: TinyShakespeare (from TRIX_DATA_DIR, or downloaded), split 90/10. Training: random windows. Validation: all of the
validation text in windows that do not overlap, mean nats per character. Everything but the feed-forward layer is the same:
d_model 128, 4 layers, 4 heads, context 128, batch 16, AdamW with cosine decay. Two comparisons: every layer at --steps, and
those of LONG_LAYERS at --long-steps. All of it takes about three hours of one core; --resume keeps the runs that a stopped
one had finished.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from case_options import check_distinct, positive, seed_number, whole
from kept_runs import RESULTS, kept_or_run, put_aside
from rich.progress import track
from torch import Tensor, nn

from lightning_modules.data.text import TextDataModule
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig, TriXFFN, routed_layers

CORPUS = "tinyshakespeare"
D_MODEL, NUM_TILES = 128, 16
LAYERS = {
    "none": FFNConfig(kind="none"),
    "dense, equal active compute": FFNConfig(kind="dense", d_ff=D_MODEL),
    "dense 4d": FFNConfig(kind="dense", d_ff=4 * D_MODEL),
    "dense 8d": FFNConfig(kind="dense", d_ff=8 * D_MODEL),  # the parameters of 16 tiles of half width
    "learned gate": FFNConfig(num_tiles=NUM_TILES, routing="learned"),
    "hash": FFNConfig(num_tiles=NUM_TILES, routing="hash"),
    "sparse lookup v1": FFNConfig(kind="sparse_lookup", num_tiles=64, route_on="hidden"),
    "sparse lookup v2": FFNConfig(kind="sparse_lookup_v2", num_tiles=64, route_on="hidden", diversity_weight=0.01),
    "sparse lookup v1, 4 tiles by embedding": FFNConfig(kind="sparse_lookup", num_tiles=64, top_k=4),
    "sparse lookup v2, 4 tiles by embedding": FFNConfig(kind="sparse_lookup_v2", num_tiles=64, top_k=4, diversity_weight=0.01),
    "trix emergent": FFNConfig(num_tiles=NUM_TILES, routing="emergent"),
    "trix explicit": FFNConfig(num_tiles=NUM_TILES),
    "trix explicit, 2 tiles of half width": FFNConfig(num_tiles=NUM_TILES, top_k=2),
    "trix explicit, 2 tiles of half width by hidden state": FFNConfig(num_tiles=NUM_TILES, top_k=2, route_on="hidden"),
}
LONG_LAYERS = (
    "dense, equal active compute",
    "dense 4d",
    "learned gate",
    "trix explicit",
    "trix explicit, 2 tiles of half width by hidden state",
)
FINISHED = RESULTS / "char_lm_quality.runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), default=600, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--long-steps", type=whole(0), default=3000, help="steps of the longer comparison; 0: none (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LAYERS, metavar="LAYER", help=f"some of: {', '.join(LAYERS)}")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(steps: int, long_steps: int, seeds: list[int], lr: float, only: list[str] | None, resume: bool) -> list[dict[str, Any]]:
    names = only or list(LAYERS)
    comparisons = {steps: names}
    if long_steps not in (0, steps):
        comparisons[long_steps] = [name for name in names if name in LONG_LAYERS]
    check_distinct(seeds=seeds, only=names)
    TextDataModule(CORPUS)  # where it cannot be had, that is told now
    if not resume:
        put_aside(FINISHED)
    # Seeds outside, layers inside: a change of the machine's speed meets all layers alike.
    results = {
        (num_steps, name, seed): finished_or_run(name, seed, num_steps, lr)
        for num_steps, chosen in comparisons.items()
        for seed in seeds
        for name in chosen
    }
    return [
        summarise(name, num_steps, [results[num_steps, name, seed] for seed in seeds])
        for num_steps, chosen in comparisons.items()
        for name in chosen
    ]


def finished_or_run(name: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    key = {"layer": name, "config": asdict(LAYERS[name]), "seed": seed, "steps": steps, "lr": lr}
    return kept_or_run(FINISHED, key, lambda: train_and_validate(name, seed, steps, lr))


def train_and_validate(name: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    data = TextDataModule(CORPUS, seed=seed, batches_per_epoch=steps)
    start = time.thread_time()
    model, lowest_diversity = train(LAYERS[name], data, seed, steps, lr, f"{name}, {steps} steps, seed {seed}")
    figures = {"seed": seed, "cpu_seconds": time.thread_time() - start, "lowest_diversity": lowest_diversity}
    validation = validate(model, data)
    return {**figures, **validation, **sizes(model, validation["mean_k"])}


def train(
    ffn: FFNConfig, data: TextDataModule, seed: int, steps: int, lr: float, title: str
) -> tuple[LanguageModel, float | None]:
    """The trained model, and the lowest diversity that any layer's signatures had (looked at every 50 steps)."""
    torch.manual_seed(seed)
    model = LanguageModel(data.vocab_size, LanguageModelConfig(d_model=D_MODEL, ffn=ffn))
    return model, train_model(model, data.train_dataloader(), steps, lr, title)


def train_model(model: LanguageModel, batches: Iterable[Any], steps: int, lr: float, title: str) -> float | None:
    """Train on (token_BT, target_BT), target -100 for none; returns the lowest diversity of signatures."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    diversities: list[float] = []
    for step, (token_BT, target_BT) in enumerate(track(batches, title, total=steps)):
        take_step(model, optimizer, token_BT, target_BT)
        schedule.step()
        if step % 50 == 0:
            diversities += [layer.get_signature_diversity() for layer in routed_layers(model)]
    return min(diversities, default=None)


def take_step(model: LanguageModel, optimizer: torch.optim.Optimizer, token_BT: Tensor, target_BT: Tensor) -> None:
    """One step of training on the cross entropy and the auxiliary losses; target -100 for none."""
    logits, _, aux = model(token_BT, return_routing=True)
    loss = F.cross_entropy(logits.flatten(0, 1), target_BT.flatten())
    optimizer.zero_grad()
    (loss if aux is None else loss + aux["total_aux"]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def validate(model: LanguageModel, data: TextDataModule) -> dict[str, float | None]:
    """Loss, tiles per token, and the spread of tokens over tiles in the worst layer; None without tiles."""
    model.eval()
    losses, uses = [], [torch.zeros(layer.num_tiles) for layer in routed_layers(model)]
    num_tokens = 0
    for token_BT, target_BT in data.val_dataloader():
        logits, infos, _ = model(token_BT, return_routing=True)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none"))
        num_tokens += token_BT.numel()
        for count_E, info in zip(uses, infos, strict=True):
            count_E += torch.bincount(info["tile_idx"][info["weight"] != 0], minlength=len(count_E))
    shares = [count_E / count_E.sum() for count_E in uses]
    entropies = [float(torch.special.entr(share_E).sum() / math.log(len(share_E))) for share_E in shares]
    return {
        "loss_nats": torch.cat(losses).mean().item(),
        "mean_k": float(sum(count_E.sum() for count_E in uses) / num_tokens / len(uses)) if uses else None,
        "max_over_mean_load": max((float(share_E.max() * len(share_E)) for share_E in shares), default=None),
        "lowest_relative_entropy": min(entropies, default=None),
    }


def sizes(model: LanguageModel, mean_k: float | None) -> dict[str, int]:
    """All parameters, and those that one token meets: of the tiles' own, mean_k / num_tiles."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0.0
    for layer in routed_layers(model):
        of_tiles = [layer.tiles] if isinstance(layer, TriXFFN) else [layer.magnitude, nn.ParameterList([layer.direction_ED])]
        count = sum(parameter.numel() for module in of_tiles for parameter in module.parameters())
        idle += count * (1 - (mean_k or 0.0) / layer.num_tiles)
    return {"parameters": total, "active_parameters": round(total - idle)}


def summarise(name: str, steps: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [result["loss_nats"] for result in results]
    return {
        "layer": name,
        "steps": steps,
        "config": asdict(LAYERS[name]),
        "loss_nats_mean": statistics.mean(losses),
        "loss_nats_spread": max(losses) - min(losses),
        "runs": results,
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = [
        "| steps | feed-forward layer | parameters | active | seeds | validation nats, mean (max - min) |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: (result["steps"], result["loss_nats_mean"])):
        first = result["runs"][0]
        rows.append(
            f"| {result['steps']} | {result['layer']} | {first['parameters']:,} | {first['active_parameters']:,} "
            f"| {len(result['runs'])} | {result['loss_nats_mean']:.3f} ({result['loss_nats_spread']:.3f}) |"
        )
    return "\n".join(rows)
