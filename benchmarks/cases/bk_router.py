"""How evenly tokens spread over tiles by the phase of the resolvent, against signatures and a learned gate, and at what loss.

A character language model (TinyShakespeare) of the small size of bk_quality, hermitian resolvent, 8 tiles in each block, two
for each token; the tiles are the same, the routing differs: by phase with edges that follow the quantiles, by phase with equal
bins, by explicit signatures that read the hidden state, by a learned gate on it. The last two have a balance loss and bias, the
phase has none. Each trains at each of --lrs; the rate with the least mean loss on the first half of the validation text is
taken, the loss on the second half is reported. The spread is the entropy of the tiles' loads over the validation text, of the
layer where it is least, as a part of ln 8. No routing may look ahead, which is tested first: an edited token moves no logit
before it, to the last bit, or, where the bits differ, to the rounding of sums in another order. State: floats that a layer
keeps of 128 tokens.

Goal: >= 0.9 for the phase with edges. Four routings, 300 steps, 3 rates and 3 seeds take about half an hour of one core;
--resume keeps the runs that a stopped one had finished.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from typing import Any

import torch
from bk_contestants import CONTESTANTS, NUM_TILES, TOP_K, fitted_config
from case_options import check_distinct, positive, seed_number, whole
from cases.bk_quality import SIZES, chosen_rate, losses_by_half, text
from cases.char_lm_quality import train_model, validate
from kept_runs import RESULTS, kept_or_run, put_aside
from turns import one_thread

from lightning_modules.comparison import check_causal
from lightning_modules.state_size import state_floats
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

SIZE = SIZES["small"]
GOAL = 0.9
OURS = "phase, calibrated edges"
ROUTINGS: dict[str, dict[str, Any]] = {
    OURS: {"routing": "scattering"},
    "phase, equal bins": {"routing": "scattering", "routing_args": {"edge_rate": 0.0}},
    "signatures": {"routing": "explicit"},
    "learned gate": {"routing": "learned"},
}
FINISHED = RESULTS / "bk_router.runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: %(default)s")
    parser.add_argument("--lrs", type=positive, nargs="+", default=[2e-3, 4e-3, 8e-3], help="peak rates (default: %(default)s)")
    parser.add_argument("--path", help="another text")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(steps: int, seeds: list[int], lrs: list[float], path: str | None, resume: bool) -> list[dict[str, Any]]:
    check_distinct(seeds=seeds, lrs=lrs)
    data = text(SIZE, steps, 0, path)
    if not resume:
        put_aside(FINISHED)
    with one_thread():
        configs = {name: config_of(routing, data.vocab_size) for name, routing in ROUTINGS.items()}
        about = {name: facts(name, config, data.vocab_size) for name, config in configs.items()}
        runs = {
            (seed, lr, name): finished_or_run(name, config, steps, seed, lr, path)
            for seed in seeds
            for lr in lrs
            for name, config in configs.items()
        }
    results = []
    for name, config in configs.items():
        by_rate = {lr: [runs[seed, lr, name] for seed in seeds] for lr in lrs}
        best = chosen_rate(by_rate)
        results.append(
            {"routing": name, "config": asdict(config), **about[name], "lr": best}
            | {"runs": by_rate[best], "runs_by_rate": {str(lr): of_rate for lr, of_rate in by_rate.items()}}
        )
    return results


def config_of(routing: dict[str, Any], vocab_size: int) -> LanguageModelConfig:
    ffn = FFNConfig(num_tiles=NUM_TILES, top_k=TOP_K, route_on="hidden", **routing)
    return fitted_config(replace(CONTESTANTS["hermitian"], ffn=ffn), vocab_size, SIZE)


def facts(name: str, config: LanguageModelConfig, vocab_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LanguageModel(vocab_size, config)
    is_bitwise = check_causal(model, name, vocab_size, SIZE.context_length)
    return {"state_floats": state_floats(model, SIZE.context_length), "is_causal_bitwise": is_bitwise}


def finished_or_run(
    name: str, config: LanguageModelConfig, steps: int, seed: int, lr: float, path: str | None
) -> dict[str, Any]:
    def train_and_validate() -> dict[str, Any]:
        data = text(SIZE, steps, seed, path)
        torch.manual_seed(seed)
        model = LanguageModel(data.vocab_size, config)
        train_model(model, data.train_dataloader(), steps, lr, f"{name}, rate {lr:g}, seed {seed}")
        return {"seed": seed, **validate(model, data), **losses_by_half(model, data)}

    key = {"config": asdict(config), "steps": steps, "seed": seed, "lr": lr, "losses": "by half"}
    return kept_or_run(FINISHED, key | ({} if path is None else {"path": path}), train_and_validate)


def table(results: list[dict[str, Any]]) -> str:
    spread = {
        result["routing"]: statistics.mean(run["lowest_relative_entropy"] for run in result["runs"]) for result in results
    }
    loss = {result["routing"]: statistics.mean(run["reported_nats"] for run in result["runs"]) for result in results}
    least = min(run["lowest_relative_entropy"] for result in results if result["routing"] == OURS for run in result["runs"])
    better = [name for name in loss if name not in (OURS, "phase, equal bins") and loss[name] < loss[OURS]]
    rows = [f"- {OURS}: loss is higher than that of {name}, by {loss[OURS] - loss[name]:.4f} nats" for name in better]
    rows.append(f"- {OURS}: spread {least:.3f} in the worst seed, goal {GOAL}: {'reached' if least >= GOAL else 'MISSED'}")
    rows += [
        "",
        "| routing | state | causal | rate | seeds | spread, mean (least) | largest / mean load | nats, mean (max - min) |",
        "|---" * 8 + "|",
    ]
    for result in sorted(results, key=lambda result: loss[result["routing"]]):
        name, runs = result["routing"], result["runs"]
        losses, spreads = ([run[key] for run in runs] for key in ("reported_nats", "lowest_relative_entropy"))
        rows.append(
            f"| {name} | {result['state_floats']:,.0f} | {'to the last bit' if result['is_causal_bitwise'] else 'to rounding'} "
            f"| {result['lr']:g} | {len(runs)} | {spread[name]:.3f} ({min(spreads):.3f}) "
            f"| {statistics.mean(run['max_over_mean_load'] for run in runs):.2f} "
            f"| {loss[name]:.4f} ({max(losses) - min(losses):.4f}) |"
        )
    return "\n".join(rows)
