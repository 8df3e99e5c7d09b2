"""Validation loss of a character language model under different mixers, the resolvent among them: one frame, equal parameters.

Text: TinyShakespeare (from TRIX_DATA_DIR, or downloaded), split 90/10, windows of 128 characters. Contestants: RoPE attention
with and without a short convolution, minGRU, SSD (Mamba-2), and the resolvent: hermitian, with one-way hopping, without the
gauge, with a vector state, with one block of attention, and with tiles for the dense layer, routed by phase or by signature;
TriX, which is attention and tiles; and, where transformers is installed, its Mamba-2, gated delta rule (Qwen3-Next) and xLSTM.
With --only also variants, which ask whether rotations by token or another eta change the order (resolvent_variants.py).
The project's recurrent ones share convolution, gate, norm and skip; "expand 2" makes them twice as wide as the model, as
Mamba-2's layer is. d_ff is such that all have the same number of parameters,
within 1 %. None may look ahead, which is tested first. Each trains with AdamW and cosine decay at each of --lrs, with the first
--choosing-seeds of the seeds; the rate with the least mean loss on the first half of the validation text is taken, and trained
with all seeds. The loss on the second half is reported. The second half is harder, so the mean of both is given too, for
comparison with results on the whole text. Seeds (of weights and batches) are paired; differences are paired t-intervals of
95 %, effect sizes mean / standard deviation.

State: floats that a layer keeps of 128 tokens. Time: of one thread on the CPU, in a step of training; the contestants take
turns, and the median of five steps counts, so that runs that were kept from other machines do not.

Goals of "0.82M", on both halves: hermitian <= 1.74 after 300 steps, <= ssd + 0.005 after 300 and <= ssd after 3000, where the
hybrid is best.
All of it takes days of one core; --resume keeps the runs that a stopped one had finished.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from bk_contestants import CONTESTANTS, OF_LIBRARY, VARIANTS, Size, chosen, fitted_config
from case_options import check_distinct, positive, seed_number, whole
from cases.char_lm_quality import take_step, train_model
from kept_runs import RESULTS, kept_or_run, put_aside
from turns import interleaved, one_thread

from lightning_modules.comparison import best_rate, check_causal, paired_significance
from lightning_modules.data.text import TextDataModule
from lightning_modules.state_size import state_floats
from trix.nn import LanguageModel, LanguageModelConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {"small": Size(64, 2, 4, 128, 8, 125_000), "0.82M": Size(128, 4, 8, 128, 16, 820_000)}
ANCHOR = "ssd"
EXPANDED = tuple(f"{name}, expand 2" for name in ("ssd", "one_way", "hermitian"))
# Whether the first is better than the second.
QUESTIONS = (
    ("hermitian", "one_way"),
    ("hermitian", ANCHOR),
    ("hermitian", "attention + convolution"),
    *(("hermitian", name) for name in OF_LIBRARY),
    *((name, name.removesuffix(", expand 2")) for name in EXPANDED),
    *((name, "Mamba2") for name in EXPANDED),
    ("hermitian, expand 2", "one_way, expand 2"),
    ("one_way, expand 2, 1 block of attention", "one_way, expand 2"),
    ("hermitian, tiles by phase", "TriX"),
    ("hermitian", "hermitian, no gauge"),
    ("hermitian", "hermitian, vector state"),
    ("hermitian, 1 block of attention", "hermitian"),
    ("hermitian, tiles by phase", "hermitian"),
    ("hermitian, tiles by phase", "hermitian, tiles by signature"),
    *((name, name.split(",")[0]) for name in VARIANTS),
)
TIMED_STEPS = 5
ANSWERS = ("LOSES to", "is not shown to differ from", "is better than")
FINISHED = RESULTS / "bk_quality.runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--steps", type=whole(1), nargs="+", default=[300, 3000], help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=seed_number, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED", help="default: %(default)s"
    )
    parser.add_argument(
        "--choosing-seeds", type=whole(1), metavar="N", help="choose the rate with the first N seeds (default: all)"
    )
    parser.add_argument("--lrs", type=positive, nargs="+", default=[2e-3, 4e-3, 8e-3], help="peak rates (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"some of: {'; '.join(CONTESTANTS)}")
    parser.add_argument("--path", help="another text")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(
    sizes: list[str],
    steps: list[int],
    seeds: list[int],
    choosing_seeds: int | None,
    lrs: list[float],
    only: list[str] | None,
    path: str | None,
    resume: bool,
) -> dict[str, Any]:
    num_choosing = len(seeds) if choosing_seeds is None else choosing_seeds
    if not 1 <= num_choosing <= len(seeds):
        raise SystemExit(f"choosing-seeds ({num_choosing}) must be >= 1 and <= the number of seeds ({len(seeds)})")
    names = chosen(only)
    check_distinct(sizes=sizes, steps=steps, seeds=seeds, lrs=lrs, only=names)
    for size in sizes:
        text(SIZES[size], steps[0], seeds[0], path)  # what is wrong with it is told now
    if not resume:
        put_aside(FINISHED)
    with one_thread():
        compared = [compare(size, num_steps, seeds, num_choosing, lrs, names, path) for size in sizes for num_steps in steps]
    return {"rows": list(chain(*compared)), "answers": list(chain(*map(answers, compared)))}


def compare(
    size_name: str, steps: int, seeds: list[int], num_choosing: int, lrs: list[float], names: list[str], path: str | None
) -> list[dict[str, Any]]:
    size = SIZES[size_name]
    data = text(size, steps, seeds[0], path)
    configs = {name: fitted_config(CONTESTANTS[name], data.vocab_size, size) for name in names}
    about = {name: facts(name, config, data) for name, config in configs.items()}
    seconds = seconds_per_step(configs, data)

    def finished(name: str, lr: float, seed: int) -> dict[str, Any]:
        return finished_or_run(configs[name], size, steps, seed, lr, path, f"{name}, {size_name}, {steps} steps")

    # Seeds outside, contestants inside: a stopped comparison has all contestants with equally many seeds.
    runs: dict[str, dict[float, list[dict[str, Any]]]] = {name: {lr: [] for lr in lrs} for name in names}
    for seed in seeds[:num_choosing]:
        for lr in lrs:
            for name in names:
                runs[name][lr].append(finished(name, lr, seed))
    best = {name: chosen_rate(of_rate) for name, of_rate in runs.items()}
    for seed in seeds[num_choosing:]:
        for name in names:
            runs[name][best[name]].append(finished(name, best[name], seed))
    rows = []
    for name, lr in best.items():
        losses = [result["reported_nats"] for result in runs[name][lr]]
        rows.append(
            {"size": size_name, "steps": steps, "contestant": name, **about[name], "lr": lr}
            | {"loss_nats_mean": statistics.fmean(losses), "loss_nats_spread": max(losses) - min(losses)}
            | {"losses": dict(zip(map(str, seeds), losses, strict=True))}
            | {"both_halves_nats_mean": statistics.fmean(map(both_halves_nats, runs[name][lr]))}
            | {"cpu_s_per_step": statistics.median(seconds[name])}
            | {"runs": {str(lr): of_rate for lr, of_rate in runs[name].items()}}
        )
    return rows


def seconds_per_step(configs: Mapping[str, LanguageModelConfig], data: TextDataModule) -> dict[str, list[float]]:
    """CPU seconds of TIMED_STEPS steps of training each, after one that does not count."""
    token_BT, target_BT = next(iter(data.train_dataloader()))
    models = {name: LanguageModel(data.vocab_size, config) for name, config in configs.items()}
    steps = {
        name: partial(take_step, model, torch.optim.AdamW(model.parameters()), token_BT, target_BT)
        for name, model in models.items()
    }
    return {name: of_turn[1:] for name, of_turn in interleaved(steps, 1 + TIMED_STEPS).items()}


def chosen_rate(runs: Mapping[float, Sequence[Mapping[str, Any]]]) -> float:
    """The rate whose runs have the least mean loss on the half that chooses."""
    return best_rate({lr: statistics.fmean(result["choosing_nats"] for result in of_rate) for lr, of_rate in runs.items()})


def both_halves_nats(result: Mapping[str, Any]) -> float:
    return (result["choosing_nats"] + result["reported_nats"]) / 2


def text(size: Size, steps: int, seed: int, path: str | None) -> TextDataModule:
    return TextDataModule("tinyshakespeare", path, size.context_length, size.batch_size, seed=seed, batches_per_epoch=steps)


def facts(name: str, config: LanguageModelConfig, data: TextDataModule) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LanguageModel(data.vocab_size, config)
    is_bitwise = check_causal(model, name, data.vocab_size, config.context_length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = state_floats(model.eval(), config.context_length)
    return {"config": asdict(config), "parameters": parameters, "state_floats": state, "is_causal_bitwise": is_bitwise}


def finished_or_run(
    config: LanguageModelConfig, size: Size, steps: int, seed: int, lr: float, path: str | None, title: str
) -> dict[str, Any]:
    def train_and_validate() -> dict[str, Any]:
        data = text(size, steps, seed, path)
        torch.manual_seed(seed)
        model = LanguageModel(data.vocab_size, config)
        train_model(model, data.train_dataloader(), steps, lr, f"{title}, rate {lr:g}, seed {seed}")
        return losses_by_half(model, data)

    key = {"config": asdict(config), "batch_size": size.batch_size, "steps": steps, "seed": seed, "lr": lr}
    return kept_or_run(FINISHED, key | ({} if path is None else {"path": path}), train_and_validate)


@torch.no_grad()
def losses_by_half(model: LanguageModel, data: TextDataModule) -> dict[str, float]:
    model.eval()
    batches = data.val_dataloader()
    loss_WT = torch.cat([F.cross_entropy(model(token).mT, target, reduction="none") for token, target in batches])
    half = len(loss_WT) // 2
    return {"choosing_nats": loss_WT[:half].mean().item(), "reported_nats": loss_WT[half:].mean().item()}


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired differences that QUESTIONS ask for, and of every contestant from the anchor."""
    row_of = {row["contestant"]: row for row in rows}
    to_anchor = tuple((name, ANCHOR) for name in row_of if name != ANCHOR)
    made = []
    for pair in dict.fromkeys((*QUESTIONS, *to_anchor)):
        if not row_of.keys() >= set(pair) or len(rows[0]["losses"]) < 2:
            continue
        ours, other = (list(row_of[name]["losses"].values()) for name in pair)
        found = paired_significance(other, ours, min_pairs=2)
        low, high = found.confidence_interval
        verdict = ANSWERS[0 if low > 0 else 2 if high < 0 else 1]
        about = {"size": rows[0]["size"], "steps": rows[0]["steps"], "contestant": pair[0], "other": pair[1]}
        made.append(about | {"verdict": verdict, **found._asdict(), "is_question": pair in QUESTIONS})
    return made


def table(results: dict[str, Any]) -> str:
    lines = []
    questions = [answer for answer in results["answers"] if answer["is_question"]]
    for answer in sorted(questions, key=lambda answer: ANSWERS.index(answer["verdict"])):
        lines.append(
            f"- {answer['contestant']} {answer['verdict']} {answer['other']} ({answer['size']}, {answer['steps']} steps): "
            f"{_interval(answer)}, effect {answer['effect_size']:+.1f}"
        )
    to_anchor = {
        (answer["size"], answer["steps"], answer["contestant"]): _interval(answer)
        for answer in results["answers"]
        if answer["other"] == ANCHOR
    }
    lines += [
        "",
        "| size | steps | mixer | parameters | state | CPU s / step | rate | seeds | nats, mean (max - min) | less ssd "
        "| nats, both halves |",
    ]
    lines.append("|---" * 11 + "|")
    for row in sorted(results["rows"], key=lambda row: (row["parameters"] > 5e5, row["steps"], row["loss_nats_mean"])):
        difference = to_anchor.get((row["size"], row["steps"], row["contestant"]), "")
        lines.append(
            f"| {row['size']} | {row['steps']} | {row['contestant']} | {row['parameters']:,} | {row['state_floats']:,.0f} "
            f"| {row['cpu_s_per_step']:.3f} | {row['lr']:g} | {len(row['losses'])} "
            f"| {row['loss_nats_mean']:.3f} ({row['loss_nats_spread']:.3f}) | {difference} "
            f"| {row['both_halves_nats_mean']:.3f} |"
        )
    return "\n".join(lines)


def _interval(answer: dict[str, Any]) -> str:
    low, high = answer["confidence_interval"]
    return f"{answer['mean_difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def figure(results: dict[str, Any]) -> "Figure":
    """The loss of each seed, a panel for each size and number of steps, the best on top."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["size"], row["steps"]) for row in results["rows"]))
    drawn = Figure(figsize=(7.5, 4.2 * len(panels)), layout="constrained")
    for axes, (size, steps) in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        rows = [row for row in results["rows"] if (row["size"], row["steps"]) == (size, steps)]
        rows.sort(key=lambda row: -row["loss_nats_mean"])
        for place, row in enumerate(rows):
            color = "C1" if row["config"]["mixer"] == "resolvent" else "C0"
            axes.plot(list(row["losses"].values()), [place] * len(row["losses"]), "o", color=color, alpha=0.5)
            axes.plot(row["loss_nats_mean"], place, "|", color="black", markersize=14)
        axes.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
        axes.set(xlabel="validation nats per character", title=f"{size}, {steps} steps")
        axes.grid(axis="x", alpha=0.3)
    return drawn
