"""Recall of key-value pairs (MQAR) against the size of the state: the resolvent, SSD, attention, and a hybrid.

A text gives P pairs of a key and a value, then asks 2 P times for any of the keys: k v k v ... | k k k k ...; 32 keys, 32
values, all pairs new in every text. The answers alone are learned. Every batch has P drawn from --pairs, and 2048 tokens
whatever P is; the accuracy is that of the answers to 1024 new texts of each P; a guess among the values seen gives about 1 / P.
Models of 2 layers, width 32, 4 heads and 30,000 parameters (d_ff makes up for what the mixers differ in), each with a short
convolution; none may look ahead, which is tested first. Every contestant trains with every rate; the best rate counts, and how
many rates reach 0.9.

As in Zoology (Arora et al., 2023, arXiv:2312.04927), one model learns texts of all P, the pairs come first, and the loss is
that of the answers. Different, for the sake of small models: 64 tokens instead of 8192; the questions follow each other, with
no random tokens between them; a key may be asked for again, and values may repeat, so nothing is learned by exclusion.

Why a vector state fails: L_ij = G_i prod_{j<=k<i} (-c_k G_k), so L_ij / L_ij' does not depend on i. Let e be the last token of
the pairs. To y_i of a question i > e they add r_i s, with the number r_i = L_ie / L_ee and s = sum_{j<=e} L_ej u_j, the same
for every question. So no question weighs the pairs; what is read of s without regard to the question is right for one of P
different values, with a loss of at least ln P. A question can choose among the coordinates of s alone, by the gate and the
layers after it; then each of the 32 keys needs coordinates of its own, however few are given, and that is not learned. In a
matrix state question and pair meet before the sum, y_i = sum_j L_ij (q_i . k_j) u_j, and P pairs need P directions of k.

Goals of the resolvent, with either hopping: 0.99 with 8 pairs, 0.95 with 16, 0.9 with 3 of the 4 rates; of the hybrid: 0.99
with 32. All of it takes a little more than an hour of one core; --resume keeps the runs that a stopped one had finished.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from bk_contestants import CONTESTANTS, Contestant, Size, fitted_config
from case_options import check_distinct, positive, seed_number, whole
from cases.char_lm_quality import train_model
from kept_runs import RESULTS, kept_or_run, put_aside
from torch import Tensor
from turns import one_thread

from lightning_modules.comparison import check_causal
from lightning_modules.state_size import state_floats
from trix.nn import LanguageModel, LanguageModelConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_KEYS = NUM_VALUES = 32
VOCAB_SIZE = NUM_KEYS + NUM_VALUES
BATCH_TOKENS, NUM_TEST = 2048, 1024
NAMES = ("attention + convolution", "ssd", "one_way", "hermitian", "hermitian, vector state", "hermitian, 1 block of attention")
HAVE_QUERIES = ("resolvent", "ssd")
OURS, VECTOR = "hermitian", "hermitian, vector state"
ROBUST = 0.9
GOALS = {(name, pairs): goal for name in ("one_way", OURS) for pairs, goal in ((8, 0.99), (16, 0.95))}
GOALS |= {("hermitian, 1 block of attention", 32): 0.99}
FINISHED = RESULTS / "bk_recall.runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=whole(1, NUM_KEYS), nargs="+", default=[4, 8, 16, 32], help="default: %(default)s")
    parser.add_argument("--widths", type=whole(1), nargs="+", default=[16], help="widths of queries (default: %(default)s)")
    parser.add_argument("--lrs", type=positive, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="default: %(default)s")
    parser.add_argument("--steps", type=whole(1), default=3000, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0], metavar="SEED", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of: {'; '.join(NAMES)}")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(
    pairs: list[int],
    widths: list[int],
    lrs: list[float],
    steps: int,
    seeds: list[int],
    only: list[str] | None,
    resume: bool,
) -> list[dict[str, Any]]:
    if not 1 <= min(pairs) <= max(pairs) <= NUM_KEYS:
        raise SystemExit(f"pairs ({pairs}) must be >= 1 and <= {NUM_KEYS}")
    names = only or list(NAMES)
    check_distinct(pairs=pairs, widths=widths, lrs=lrs, seeds=seeds, only=names)
    if not resume:
        put_aside(FINISHED)
    with one_thread():
        measured = [measure(name, contestant, pairs, lrs, steps, seeds) for name, contestant in contestants(names, widths)]
    return list(chain(*measured))


def contestants(names: list[str], widths: list[int]) -> Iterator[tuple[str, Contestant]]:
    """Each with every width of queries, where it has any to choose."""
    for name in names:
        plain = CONTESTANTS[name]
        if plain.mixer not in HAVE_QUERIES or "d_state" in plain.mixer_args:
            yield name, plain
        else:
            for width in widths:
                yield name, Contestant(plain.mixer, {**plain.mixer_args, "d_state": width}, plain.is_hybrid)


def measure(
    name: str, contestant: Contestant, pairs: list[int], lrs: list[float], steps: int, seeds: list[int]
) -> list[dict[str, Any]]:
    size = Size(32, 2, 4, 4 * max(pairs), BATCH_TOKENS // (4 * max(pairs)), 30_000)
    config = fitted_config(contestant, VOCAB_SIZE, size)
    torch.manual_seed(0)
    model = LanguageModel(VOCAB_SIZE, config)
    about = {
        "contestant": name,
        "config": asdict(config),
        "query_width": config.mixer_args.get("d_state"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "is_causal_bitwise": check_causal(model, name, VOCAB_SIZE, size.context_length),
    }
    model.eval()
    runs = {lr: [finished_or_run(name, config, pairs, lr, steps, seed) for seed in seeds] for lr in lrs}
    rows = []
    for num_pairs in pairs:
        accuracies = {str(lr): statistics.fmean(run[str(num_pairs)] for run in of_rate) for lr, of_rate in runs.items()}
        state = state_floats(model, 4 * num_pairs)
        of_pairs = {"pairs": num_pairs, "state_floats": state, "accuracy": max(accuracies.values())}
        rows.append(about | of_pairs | {"accuracy_by_rate": accuracies})
    return rows


def finished_or_run(
    name: str, config: LanguageModelConfig, pairs: list[int], lr: float, steps: int, seed: int
) -> dict[str, float]:
    """The accuracy for each number of pairs, which is written as text: so JSON returns it."""

    def train_and_test() -> dict[str, float]:
        torch.manual_seed(seed)
        model = LanguageModel(VOCAB_SIZE, config)
        draw = torch.Generator().manual_seed(seed)
        train_model(model, batches(pairs, steps, draw), steps, lr, f"{name}, rate {lr:g}, seed {seed}")
        return {str(num_pairs): accuracy(model, num_pairs) for num_pairs in pairs}

    key = {"config": asdict(config), "pairs": pairs, "batch_tokens": BATCH_TOKENS, "steps": steps, "seed": seed, "lr": lr}
    return kept_or_run(FINISHED, key, train_and_test)


def batches(pairs: list[int], steps: int, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The texts of a batch have the same number of pairs, drawn from those given; as many texts as make BATCH_TOKENS."""
    for place in torch.randint(len(pairs), (steps,), generator=draw).tolist():
        yield texts(pairs[place], BATCH_TOKENS // (4 * pairs[place]), draw)


def texts(num_pairs: int, num_texts: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [num_texts, 4 * num_pairs]: the value where a key is asked for, -100 elsewhere."""
    key_BP = torch.rand(num_texts, NUM_KEYS, generator=draw).argsort(dim=1)[:, :num_pairs]
    value_BP = torch.randint(NUM_KEYS, VOCAB_SIZE, (num_texts, num_pairs), generator=draw)
    asked_BQ = torch.randint(num_pairs, (num_texts, 2 * num_pairs), generator=draw)
    given_BT = torch.stack([key_BP, value_BP], dim=-1).flatten(1)
    token_BT = torch.cat([given_BT, key_BP.gather(1, asked_BQ)], dim=1)
    target_BT = torch.cat([torch.full_like(given_BT, -100), value_BP.gather(1, asked_BQ)], dim=1)
    return token_BT, target_BT


@torch.no_grad()
def accuracy(model: LanguageModel, num_pairs: int) -> float:
    model.eval()
    token_BT, target_BT = texts(num_pairs, NUM_TEST, torch.Generator().manual_seed(2**31))
    is_asked_BT = target_BT >= 0
    is_right = [
        (model(token).argmax(dim=-1) == target)[is_asked]
        for token, target, is_asked in zip(token_BT.split(64), target_BT.split(64), is_asked_BT.split(64), strict=True)
    ]
    return torch.cat(is_right).float().mean().item()


def table(results: list[dict[str, Any]]) -> str:
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result["accuracy"]):
        best[result["contestant"], result["pairs"]] = result
    lines = []
    for (name, num_pairs), result in best.items():
        ours = best.get((OURS, num_pairs))
        if ours is not None and ours["accuracy"] < result["accuracy"]:
            lines.append(
                f"- {OURS} LOSES to {name}, {num_pairs} pairs: {ours['accuracy']:.3f} against {result['accuracy']:.3f}"
            )
    said = []
    for (name, num_pairs), goal in GOALS.items():
        if (name, num_pairs) in best:
            result = best[name, num_pairs]
            count = f"{robust_rates(result)} of {len(result['accuracy_by_rate'])} rates >= {ROBUST}, goal 3"
            said.append((result["accuracy"] >= goal, f"{name}, {num_pairs} pairs: {result['accuracy']:.3f}, goal {goal}"))
            said.append((robust_rates(result) >= 3, f"{name}, {num_pairs} pairs: {count}"))
    for (name, num_pairs), result in best.items():
        if name == VECTOR and num_pairs > 1:
            what = f"{result['accuracy']:.3f}, a guess among the values seen {1 / num_pairs:.3f}"
            said.append((result["accuracy"] < ROBUST, f"{name} fails, {num_pairs} pairs: {what}"))
    lines += [f"- {'reached' if is_met else 'MISSED'}: {what}" for is_met, what in sorted(said)]
    lines += ["", f"| pairs | mixer | query width | state | best accuracy | rates >= {ROBUST} | by rate |", "|---" * 7 + "|"]
    for result in sorted(results, key=lambda result: (result["pairs"], -result["accuracy"])):
        by_rate = ", ".join(f"{float(lr):g}: {value:.3f}" for lr, value in result["accuracy_by_rate"].items())
        lines.append(
            f"| {result['pairs']} | {result['contestant']} | {result['query_width'] or ''} | {result['state_floats']:,.0f} "
            f"| {result['accuracy']:.3f} | {robust_rates(result)} | {by_rate} |"
        )
    return "\n".join(lines)


def robust_rates(result: dict[str, Any]) -> int:
    return sum(value >= ROBUST for value in result["accuracy_by_rate"].values())


def figure(results: list[dict[str, Any]]) -> "Figure":
    """Best accuracy by floats of state, a panel for each number of pairs."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(result["pairs"] for result in results))
    drawn = Figure(figsize=(4.2 * len(pairs), 4.2), layout="constrained")
    for axes, num_pairs in zip(drawn.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for name in dict.fromkeys(result["contestant"] for result in results):
            points = [
                (result["state_floats"], result["accuracy"])
                for result in results
                if (result["contestant"], result["pairs"]) == (name, num_pairs)
            ]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xscale="log", ylim=(-0.02, 1.02), title=f"{num_pairs} pairs", xlabel="state, floats per layer")
    drawn.axes[0].set_ylabel("accuracy at the best rate")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn
