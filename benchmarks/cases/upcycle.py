"""A trained layer of one ternary tile cut into tiles: held-out loss against controls, as cut and after further training.

A character language model as in char_lm_quality, with one ternary tile of width 512 in each layer, is trained for --steps and
then cut into 16 tiles, of which a token goes to 16, 8 or 4. Contenders with as many active neurons per token: neurons grouped
by co-activation, with signatures that stay or learn, or grouped at random, with signatures fitted in the same way; the neurons
of the largest norms, or of the most activity, for all tokens; the tiles that the output needs most, found by computing all; and
a model of that width trained from scratch for as many steps in total, along one cosine. Further training: --more-steps of a
fresh AdamW along a cosine from --more-lr, the same batches for all, the original among them. Losses in nats per character on
all of the validation text. --resume keeps the runs that a stopped one had finished.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from case_options import check_distinct, positive, seed_number, whole
from cases import char_lm_quality as quality
from kept_runs import RESULTS, kept_or_run, put_aside
from torch import Tensor
from turns import one_thread

from lightning_modules.data.text import TextDataModule
from trix.nn import FFNConfig, LanguageModel, routed_layers
from trix.upcycling import GROUPINGS, Upcycled, best_choice, check_upcycling, held_out_loss, prune, upcycle

WIDTH, NUM_TILES, TOP_KS = 512, 16, (16, 8, 4)
TEXT_TOKENS = 16_384
FINISHED = RESULTS / "upcycle.runs.jsonl"
ORIGINAL, FROM_SCRATCH, BEST_CHOICE = "the original", "from scratch", "best tiles of co-activation"
NAMES = {"coactive": "grouped by co-activation", "random": "grouped at random"}
LEARNING = "grouped by co-activation, signatures learn"
PRUNED = {"magnitude": "pruned by magnitude", "activity": "pruned by activity"}
Losses = dict[str, float | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--more-steps", type=whole(1), default=300, help="steps after the cut (default: %(default)s)")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--more-lr", type=positive, default=1e-3, help="the same after the cut (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call finished")


def run(
    steps: int, more_steps: int, seeds: list[int], lr: float, more_lr: float, resume: bool, corpus: str = quality.CORPUS
) -> list[dict[str, Any]]:
    check_distinct(seeds=seeds)
    TextDataModule(corpus)  # where it cannot be had, that is told now
    if not resume:
        put_aside(FINISHED)
    settings = {"steps": steps, "more_steps": more_steps, "lr": lr, "more_lr": more_lr, "corpus": corpus}
    found: dict[tuple[str, int], list[Losses]] = {}
    with one_thread():
        for seed in seeds:
            contest = _Contest(seed, **settings)
            for (name, top_k), measure in contest.contenders().items():
                key = {"contender": name, "top_k": top_k, "seed": seed, **settings}
                found.setdefault((name, top_k), []).append(kept_or_run(FINISHED, key, measure))
    return [
        {"contender": name, "top_k": top_k, "as_cut": _summary(losses, "as_cut"), "trained": _summary(losses, "trained")}
        for (name, top_k), losses in found.items()
    ]


class _Contest:
    """All contenders of one seed, each a function that measures it; what they share is made when it is first needed."""

    def __init__(self, seed: int, steps: int, more_steps: int, lr: float, more_lr: float, corpus: str) -> None:
        self.seed, self.steps, self.more_steps, self.lr, self.more_lr, self.corpus = (
            seed,
            steps,
            more_steps,
            lr,
            more_lr,
            corpus,
        )
        self.original = cache(partial(self._from_scratch, WIDTH, steps))
        self.upcycled = cache(self._upcycle)

    def contenders(self) -> dict[tuple[str, int], Callable[[], Losses]]:
        found: dict[tuple[str, int], Callable[[], Losses]] = {
            (ORIGINAL, NUM_TILES): lambda: self._measure(self.original()),
            (NAMES["coactive"], NUM_TILES): lambda: self._measure(self.upcycled("coactive", NUM_TILES).network),
        }
        for top_k in TOP_KS[1:]:
            width = WIDTH * top_k // NUM_TILES
            for grouping in GROUPINGS:
                found[NAMES[grouping], top_k] = lambda g=grouping, k=top_k: self._measure(self.upcycled(g, k).network)
            found[LEARNING, top_k] = lambda k=top_k: self._measure(self._unfrozen(k))
            found[BEST_CHOICE, top_k] = lambda k=top_k: self._measure_best(k)
            for way, name in PRUNED.items():
                found[name, top_k] = lambda w=way, n=width: self._measure(prune(self.original(), self._text(), n, w))
            found[FROM_SCRATCH, top_k] = lambda n=width: {
                "as_cut": None,
                "trained": self._loss(self._from_scratch(n, self.steps + self.more_steps)),
            }
        return found

    def _from_scratch(self, width: int, steps: int) -> LanguageModel:
        ffn = FFNConfig(num_tiles=1, d_ff=width, route_on="hidden")
        model, _ = quality.train(
            ffn, self._data(self.seed, steps), self.seed, steps, self.lr, f"width {width}, seed {self.seed}"
        )
        return model.eval()

    def _upcycle(self, grouping: Any, top_k: int) -> Upcycled:
        return upcycle(self.original(), self._text(), NUM_TILES, top_k, grouping=grouping, seed=self.seed, freeze=True)

    def _unfrozen(self, top_k: int) -> LanguageModel:
        network = copy.deepcopy(self.upcycled("coactive", top_k).network)
        for layer in routed_layers(network):
            layer.unfreeze_all_signatures()
        return network

    def _text(self) -> Tensor:
        data = self._data(self.seed, 1)
        return data.training_documents()[: TEXT_TOKENS // data.context_length]

    def _data(self, seed: int, steps: int) -> TextDataModule:
        return TextDataModule(self.corpus, seed=seed, batches_per_epoch=steps)  # type: ignore[arg-type]

    def _measure(self, network: LanguageModel) -> Losses:
        """As it is, and a copy of it after further training."""
        as_cut, trained = self._loss(network), copy.deepcopy(network).train()
        batches = self._data(self.seed + 1000, self.more_steps).train_dataloader()  # not those of the training before
        quality.train_model(trained, batches, self.more_steps, self.more_lr, f"further, seed {self.seed}")
        return {"as_cut": as_cut, "trained": self._loss(trained.eval())}

    def _measure_best(self, top_k: int) -> Losses:
        network, groups = self.upcycled("coactive", top_k)
        with best_choice(network, check_upcycling(self.original(), NUM_TILES, top_k), groups):
            return {"as_cut": self._loss(network), "trained": None}

    def _loss(self, network: LanguageModel) -> float:
        token_BT, target_BT = map(torch.cat, zip(*self._data(self.seed, 1).val_dataloader(), strict=True))
        return held_out_loss(network, token_BT, target_BT)


def _summary(runs: list[Losses], name: str) -> dict[str, Any] | None:
    losses = [loss for run in runs if (loss := run[name]) is not None]
    if not losses:
        return None
    return {"mean": statistics.mean(losses), "spread": max(losses) - min(losses), "losses": losses}


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| neurons per token | model | nats as cut, mean (max - min) | nats after further training |", "|---|---|---|---|"]
    for result in results:
        figures = [
            "" if summary is None else f"{summary['mean']:.3f} ({summary['spread']:.3f})"
            for summary in (result["as_cut"], result["trained"])
        ]
        rows.append(f"| {WIDTH * result['top_k'] // NUM_TILES} | {result['contender']} | {' | '.join(figures)} |")
    return "\n".join(rows)
