"""Held-out loss of two classifiers by what decides about the tile: hidden states, the embedding, a fixed frame, a hash, a gate.

A fixed frame is `route_on: context`: a code of the last two tokens that nothing trains. Where tokens are vectors it is a frozen
random projection of their features (trix.nn.FeatureCode), where they are ids a sum of frozen rows (ContextCode).

digits: the network and the data of configs/digits.yaml, 550 steps, after which the training loss is 0.002; a token is a row of
eight pixels, 8 tiles. Held out: the validation images. language_id: those of configs/language_id.yaml, 32 tiles, for half of
its steps; a token is a character. Held out: the test texts; needs Django's translations, and is left out
where they are not installed. A seed is that of the network, the split and the order of the batches. AdamW with cosine decay,
batches of 64.

Contestants: dense layers of width d, which is the active compute of one tile, and 4d; a hash of the token (of digits the bits
of the row's code); a learned gate that reads the hidden state; signatures that read the hidden state, the embedding, or the
fixed frame, as drawn and learned. All with the same number of tiles of width d, one for each token, and the balance of the
configurations; signatures as drawn have no balance bias, so that no token ever changes its tile.

Churn: % of held-out tokens (at most 256 images or texts) whose tile is another one than 50 steps before, mean of the layers,
median of the second half of training. Load: of the tile that most held-out tokens go to, over the mean; the worst layer. Dead:
tiles without any held-out token, in all layers. Seconds: CPU time of one thread in training. Intervals: 95 %, paired t-test
over the seeds; there are twelve comparisons in each data set, so one of them may look like a difference that is none.
--resume keeps the runs that a stopped one had finished.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from functools import cache
from typing import Any

import code_hash
import torch
import torch.nn.functional as F
from case_options import check_distinct, seed_number, whole
from cases import language_id
from cases.language_id import batches, train_step
from kept_runs import RESULTS, kept_or_run, put_aside
from rich.progress import track
from torch import Tensor
from turns import one_thread

from lightning_modules.comparison import paired_significance
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.errors import DataError
from trix.nn import Classifier, ClassifierConfig, FFNConfig, TriXFFN, routed_layers

DATA = ("digits", "language_id")
D_MODEL = 64
NUM_TILES = {"digits": 8, "language_id": language_id.NUM_TILES}
HASH: dict[str, dict[str, Any]] = {
    "digits": {"routing": f"{code_hash.__name__}.CodeHash", "route_on": "context", "context_tokens": 1},
    "language_id": {"routing": "hash"},
}
PROBED = 256  # images or texts
CHURN_EVERY = 50  # steps
DRAWN, LEARNED = "signatures on the fixed frame, as drawn", "signatures on the fixed frame, learned"
CONTROLS = ("dense d", "dense 4d", "hash of the token", "gate on hidden", "signatures on hidden", "signatures on embedding")
LAYERS = (*CONTROLS, DRAWN, LEARNED)
FINISHED = RESULTS / "fixed_frame.runs.jsonl"


def layer_of(name: str, data: str) -> FFNConfig:
    """The feed-forward layer of a contestant."""
    settings: dict[str, dict[str, Any]] = {
        "dense d": {"kind": "dense", "d_ff": D_MODEL},
        "dense 4d": {"kind": "dense", "d_ff": 4 * D_MODEL},
        "hash of the token": HASH[data],
        "gate on hidden": {"routing": "learned", "route_on": "hidden"},
        "signatures on hidden": {"route_on": "hidden"},
        "signatures on embedding": {},
        DRAWN: {"route_on": "context", "balance_rate": 0.0},
        LEARNED: {"route_on": "context", "signatures": "learned"},
    }
    return FFNConfig(**({"num_tiles": NUM_TILES[data]} | settings[name]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="default: %(default)s")
    seeds: dict[str, Any] = {"type": seed_number, "nargs": "+", "metavar": "SEED", "help": "default: %(default)s"}
    parser.add_argument("--digits-seeds", default=[0, 1, 2, 3, 4], **seeds)
    parser.add_argument("--language-seeds", default=[0, 1, 2], **seeds)
    parser.add_argument("--digits-steps", type=whole(1), default=550, help="training steps (default: %(default)s)")
    parser.add_argument("--language-steps", type=whole(1), default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LAYERS, metavar="LAYER", help=f"some of: {'; '.join(LAYERS)}")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(
    data: list[str],
    digits_seeds: list[int],
    language_seeds: list[int],
    digits_steps: int,
    language_steps: int,
    only: list[str] | None,
    resume: bool,
) -> dict[str, Any]:
    names = only or list(LAYERS)
    check_distinct(data=data, digits_seeds=digits_seeds, language_seeds=language_seeds, only=names)
    plans = {"digits": (digits_seeds, digits_steps), "language_id": (language_seeds, language_steps)}
    left_out, rows = {}, []
    if not resume:
        put_aside(FINISHED)
    for kind in data:
        seeds, steps = plans[kind]
        try:
            data_module(kind, seeds[0])
        except DataError as error:
            left_out[kind] = str(error)
            continue
        with one_thread():
            # Seeds outside, layers inside: a change of the machine's speed meets all layers alike.
            runs = {(seed, name): finished_or_run(name, kind, steps, seed) for seed in seeds for name in names}
        rows += [summary(name, kind, steps, [runs[seed, name] for seed in seeds]) for name in names]
    return {"left_out": left_out, "rows": rows}


@cache
def data_module(kind: str, seed: int) -> TrixDataModule:
    return DigitsDataModule(seed=seed) if kind == "digits" else LanguageIdDataModule(seed=seed)


def finished_or_run(name: str, kind: str, steps: int, seed: int) -> dict[str, Any]:
    key = {"data": kind, "layer": name, "config": asdict(layer_of(name, kind)), "seed": seed, "steps": steps}
    return kept_or_run(FINISHED, key, lambda: measure(name, kind, steps, seed))


def measure(name: str, kind: str, steps: int, seed: int) -> dict[str, Any]:
    data = data_module(kind, seed)
    model = make_model(data, layer_of(name, kind), seed)
    x, label_N = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seconds, tiles = 0.0, None
    churn: list[float] = []
    what = f"{kind}, {name}, seed {seed}"
    for step, (inputs, label_B) in enumerate(track(batches(data, steps), what, total=steps), start=1):
        start = time.thread_time()
        train_step(model, optimizer, inputs, label_B)
        schedule.step()
        seconds += time.thread_time() - start
        if step % CHURN_EVERY == 0:
            before, tiles = tiles, tiles_of(model, x[:PROBED])
            if before is not None and tiles is not None:
                churn.append(float((tiles != before).float().mean()))
    return {"seed": seed, "cpu_seconds": seconds, "churn": churn} | held_out(model, x, label_N) | sizes(model) | load(model, x)


def make_model(data: TrixDataModule, ffn: FFNConfig, seed: int) -> Classifier:
    if isinstance(data, LanguageIdDataModule):
        return language_id.make_model(data, ffn, seed)
    assert isinstance(data, DigitsDataModule)
    torch.manual_seed(seed)
    return Classifier(data.num_features, data.num_classes, ClassifierConfig(D_MODEL, context_length=8, ffn=ffn))


@torch.no_grad()
def held_out(model: Classifier, x: Tensor, label_N: Tensor) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(part) for part in x.split(256)])
    return {
        "loss_nats": F.cross_entropy(logits, label_N).item(),
        "error": float((logits.argmax(dim=-1) != label_N).float().mean()),
    }


@torch.no_grad()
def tiles_of(model: Classifier, x: Tensor) -> Tensor | None:
    """The tile of each token, without padding: int64 [layers, tokens]; None without tiles."""
    model.eval()
    parts = []
    for part in x.split(256):
        mask_BT = model.padding_mask(part)
        tiles = [info["tile_idx"][..., 0] for info in model(part, return_routing=True)[1]]
        parts.append([tile_BT.flatten() if mask_BT is None else tile_BT[mask_BT] for tile_BT in tiles])
    return torch.stack([torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]) if parts[0] else None


def load(model: Classifier, x: Tensor) -> dict[str, Any]:
    tiles = tiles_of(model, x)
    if tiles is None:
        return {}
    layers = routed_layers(model)
    counts = [torch.bincount(tile_N, minlength=layer.num_tiles) for layer, tile_N in zip(layers, tiles, strict=True)]
    return {
        "max_over_mean_load": max(float(count_E.max() / count_E.float().mean()) for count_E in counts),
        "num_dead": sum(int((count_E == 0).sum()) for count_E in counts),
    }


def sizes(model: Classifier) -> dict[str, int]:
    """All parameters, and those that one token meets: of the tiles' own, those of one tile."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in routed_layers(model):
        assert isinstance(layer, TriXFFN)
        of_tiles = sum(parameter.numel() for parameter in layer.tiles.parameters())
        idle += of_tiles - of_tiles // layer.num_tiles
    return {"parameters": total, "active_parameters": total - idle}


def summary(name: str, kind: str, steps: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"data": kind, "layer": name, "steps": steps, "config": asdict(layer_of(name, kind)), "runs": runs}


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    lines = [line for kind in kinds for line in verdicts([row for row in rows if row["data"] == kind])]
    lines.sort(key=lambda line: " LOSES to " not in line)
    lines += [f"- {kind} is left out: {why}" for kind, why in results["left_out"].items()]
    lines += [
        "",
        "| data | feed-forward layer | held-out nats, mean (max - min) | error, % (max - min) | churn, % | load | dead | CPU s "
        "| active | parameters |",
        "|---" * 10 + "|",
    ]
    for kind in kinds:
        lines += [cells(row) for row in sorted((row for row in rows if row["data"] == kind), key=mean_loss)]
    return "\n".join(lines)


def mean_loss(row: dict[str, Any]) -> float:
    return statistics.fmean(run["loss_nats"] for run in row["runs"])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Ours against each control, in one data set."""
    losses = {row["layer"]: [run["loss_nats"] for run in row["runs"]] for row in rows}
    lines = []
    for ours in (DRAWN, LEARNED):
        for other in CONTROLS:
            if ours in losses and other in losses and len(losses[ours]) > 1:
                found = paired_significance(losses[other], losses[ours], min_pairs=2)
                low, high = found.confidence_interval
                verdict = "LOSES to" if low > 0 else "is better than" if high < 0 else "is not shown to differ from"
                said = f"{found.mean_difference:+.4f} nats ({low:+.4f} to {high:+.4f})"
                lines.append(f"- {rows[0]['data']}: {ours} {verdict} {other}: {said}")
    return lines


def cells(row: dict[str, Any]) -> str:
    runs = row["runs"]
    losses, errors = [run["loss_nats"] for run in runs], [100 * run["error"] for run in runs]
    routing = " |  |  "
    if "num_dead" in runs[0]:
        churn = [100 * statistics.median(run["churn"][len(run["churn"]) // 2 :]) for run in runs if run["churn"]]
        worst = [max(run[name] for run in runs) for name in ("max_over_mean_load", "num_dead")]
        routing = f"{f'{statistics.fmean(churn):.1f}' if churn else ''} | {worst[0]:.1f} | {worst[1]}"
    return (
        f"| {row['data']} | {row['layer']} | {statistics.fmean(losses):.4f} ({max(losses) - min(losses):.4f}) "
        f"| {statistics.fmean(errors):.2f} ({max(errors) - min(errors):.2f}) | {routing} "
        f"| {statistics.fmean(run['cpu_seconds'] for run in runs):.0f} "
        f"| {runs[0]['active_parameters']:,} | {runs[0]['parameters']:,} |"
    )
