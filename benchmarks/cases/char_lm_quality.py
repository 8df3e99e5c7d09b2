"""Validation loss of a character language model under different feed-forward layers, at equal steps and tokens.

Text: TinyShakespeare (from TRIX_DATA_DIR, or downloaded), split 90/10. Training: random windows. Validation: all of the
validation text in windows that do not overlap, mean nats per character. Everything but the feed-forward layer is the same:
d_model 128, 4 layers, 4 heads, context 128, batch 16, AdamW with cosine decay. 600 steps, 3 seeds and every layer take
about an hour on 2 cores.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track

from lightning_modules.data.text import TextDataModule
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig, TriXFFN

D_MODEL, NUM_TILES = 128, 16
LAYERS = {
    "none": FFNConfig(kind="none"),
    "dense, equal active compute": FFNConfig(kind="dense", d_ff=D_MODEL),
    "dense 4d": FFNConfig(kind="dense", d_ff=4 * D_MODEL),
    "dense, equal parameters": FFNConfig(kind="dense", d_ff=NUM_TILES * D_MODEL),
    "learned gate": FFNConfig(num_tiles=NUM_TILES, routing="learned"),
    "trix emergent": FFNConfig(num_tiles=NUM_TILES, routing="emergent"),
    "trix explicit": FFNConfig(num_tiles=NUM_TILES, routing="explicit"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LAYERS, metavar="LAYER", help=f"some of: {', '.join(LAYERS)}")


def run(steps: int, seeds: int, lr: float, only: list[str] | None) -> list[dict[str, Any]]:
    # Seeds outside, layers inside: a change of the machine's speed meets all layers alike.
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in only or LAYERS}
    for seed in range(seeds):
        data = TextDataModule("tinyshakespeare", seed=seed, batches_per_epoch=steps)
        for name in runs:
            runs[name].append(train_and_validate(name, data, seed, steps, lr))
    return [summarise(name, results) for name, results in runs.items()]


def train_and_validate(name: str, data: TextDataModule, seed: int, steps: int, lr: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = LanguageModel(data.vocab_size, LanguageModelConfig(d_model=D_MODEL, ffn=LAYERS[name]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    diversities: list[float] = []
    start = time.perf_counter()
    for step, (token_BT, target_BT) in enumerate(track(data.train_dataloader(), f"{name}, seed {seed}", total=steps)):
        logits, _, aux = model(token_BT, return_routing=True)
        loss = F.cross_entropy(logits.flatten(0, 1), target_BT.flatten())
        optimizer.zero_grad()
        (loss if aux is None else loss + aux["total_aux"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            diversities += [ffn.get_signature_diversity() for ffn in routed(model)]
    figures = {"seconds": time.perf_counter() - start, "lowest_diversity": min(diversities, default=None)}
    return {"seed": seed, **figures, **validate(model, data), **sizes(model)}


def routed(model: LanguageModel) -> list[TriXFFN]:
    return [module for module in model.modules() if isinstance(module, TriXFFN)]


@torch.no_grad()
def validate(model: LanguageModel, data: TextDataModule) -> dict[str, float | None]:
    """Loss and the spread of tokens over tiles, in the worst layer; None without tiles."""
    model.eval()
    losses, usage = [], torch.zeros(len(routed(model)), NUM_TILES)
    for token_BT, target_BT in data.val_dataloader():
        logits, infos, _ = model(token_BT, return_routing=True)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none"))
        for count_E, info in zip(usage, infos, strict=True):
            count_E += torch.bincount(info["tile_idx"].flatten(), minlength=NUM_TILES)
    usage /= usage.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(usage).sum(1) / torch.tensor(float(NUM_TILES)).log()
    return {
        "loss_nats": torch.cat(losses).mean().item(),
        "max_over_mean_load": float(usage.max() * NUM_TILES) if len(usage) else None,
        "lowest_relative_entropy": float(entropy.min()) if len(usage) else None,
    }


def sizes(model: LanguageModel) -> dict[str, int]:
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(ffn.tiles.up.shape.numel() * 2 * (NUM_TILES - ffn.router.top_k) // NUM_TILES for ffn in routed(model))
    return {"parameters": total, "active_parameters": total - idle}


def summarise(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [result["loss_nats"] for result in results]
    return {
        "layer": name,
        "config": asdict(LAYERS[name]),
        "loss_nats_mean": statistics.mean(losses),
        "loss_nats_spread": max(losses) - min(losses),
        "runs": results,
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| feed-forward layer | parameters | active | validation nats, mean (max - min) |", "|---|---|---|---|"]
    for result in sorted(results, key=lambda result: result["loss_nats_mean"]):
        first = result["runs"][0]
        rows.append(
            f"| {result['layer']} | {first['parameters']:,} | {first['active_parameters']:,} "
            f"| {result['loss_nats_mean']:.3f} ({result['loss_nats_spread']:.3f}) |"
        )
    return "\n".join(rows)
