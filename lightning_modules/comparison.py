"""Language models measured as the literature does, and compared fairly: same data, steps and rates, several seeds, no leak.

Legend: N tokens of a text, B windows, T tokens of a window.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_modules.callbacks.run_record import environment
from lightning_modules.contestants import CONTESTANTS, MakeModel
from lightning_modules.data.corpora import WIKITEXT_TEST, WIKITEXT_VALID, Corpus, RemoteFile, fetch, load_corpus, load_file
from lightning_modules.drawings import as_svg
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import DataError, UserError
from lightning_modules.resnet_bk.trainer import Trainer, logits_of
from lightning_modules.state_size import state_floats
from lightning_modules.tasks.task import default_lr_scheduler
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["word", "byte"]
UNITS: tuple[Unit, ...] = ("word", "byte")
SPLITS: dict[str, RemoteFile] = {"test": WIKITEXT_TEST, "valid": WIKITEXT_VALID}
END_OF_LINE, UNKNOWN = "<eos>", "<unk>"
DEFAULT_CONTEXT = 128
NUM_BYTES = 256
MIN_PAIRS = 5
MAX_SIZE_RATIO = 1.01
CONFIDENCE = 0.95
MAX_MOVE = 1e-9  # of a logit, in float64: what sums of another order come to


class WikiText2Benchmark:
    """Perplexity on WikiText-2, per word as in the literature: exp(nats of the whole text / number of its words).

    A word is what stands between spaces, and the end of a line is one too (``<eos>``): 245,569 in the test split, 217,646 in
    the validation split. So models of words and of bytes can be compared. The first token has nothing before it and is not
    predicted; every other one is predicted once, in windows that begin every ``stride`` tokens, from at least
    context_length - stride tokens before it (fewer at the head of the text).

    Note that this project's corpus ``wikitext-2`` trains on the test split: a model trained on it is measured on "valid".

    Args:
        path: the text; None finds the split in TRIX_DATA_DIR, else downloads it. split: "test" or "valid".
        unit: "word": token ids are places in the vocabulary; "byte": they are the bytes of the text in UTF-8.
        vocabulary: the words by token id, as the model was trained with; None: those of the text, the most frequent first.
            A word outside of it is ``<unk>``.
        context_length: tokens that a model is given; None: 128. stride: 1 to context_length; None: half of it.

    Raises:
        ValueError: unknown split or unit, or a stride or context out of range. DataError: the text cannot be had.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        split: str = "test",
        unit: Unit = "word",
        vocabulary: Sequence[str] | None = None,
        context_length: int | None = None,
        stride: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split ({split!r}) must be one of {', '.join(SPLITS)}")
        if unit not in UNITS:
            raise ValueError(f"unit ({unit!r}) must be one of {', '.join(UNITS)}")
        self.unit, self.context_length = unit, DEFAULT_CONTEXT if context_length is None else context_length
        self.stride = max(1, self.context_length // 2) if stride is None else stride
        if not 1 <= self.stride <= self.context_length:
            raise ValueError(f"stride ({self.stride}) must be >= 1 and <= context_length ({self.context_length})")
        text = load_file(fetch(SPLITS[split]) if path is None else path).train_text
        words = [word for line in text.removesuffix("\n").split("\n") for word in (*line.split(), END_OF_LINE)]
        self.num_words, self.num_bytes = len(words), len(text.encode())
        if unit == "byte":
            self.vocabulary: tuple[str, ...] | None = None
            self.vocab_size = NUM_BYTES
            self.token_N = torch.tensor(list(text.encode()))
        else:
            self.vocabulary = tuple(vocabulary) if vocabulary is not None else _by_frequency(words)
            self.vocab_size = len(self.vocabulary)
            self.token_N = _token_ids(words, self.vocabulary)
        if len(self.token_N) < 2:
            raise DataError(f"number of tokens ({len(self.token_N)}) must be >= 2")

    def evaluate(self, model: nn.Module, batch_size: int = 8) -> dict[str, Any]:
        """``perplexity`` (per word), ``token_perplexity``, ``loss`` (nats per token), ``bits_per_byte``; and what was measured:
        ``unit``, ``num_tokens`` (predicted), ``num_words``, ``context_length``, ``stride``, ``vocab_size``.

        Args:
            model: model(input_ids [B, T]) gives logits [B, T, V], or what has ``logits``. batch_size: windows at a time.

        Raises:
            ValueError: V is smaller than the vocabulary.
        """
        nats, num_tokens = total_nats(model, self.token_N, self.vocab_size, self.context_length, self.stride, batch_size)
        return {
            "perplexity": _exp(nats / self.num_words),
            "token_perplexity": _exp(nats / num_tokens),
            "loss": nats / num_tokens,
            "bits_per_byte": nats / math.log(2) / self.num_bytes,
            "unit": self.unit,
            "num_tokens": num_tokens,
            "num_words": self.num_words,
            "context_length": self.context_length,
            "stride": self.stride,
            "vocab_size": self.vocab_size,
        }


class Significance(NamedTuple):
    """A paired t-test of b - a. confidence_interval: of the mean difference, 95 %. effect_size: mean / standard deviation."""

    p_value: float
    mean_difference: float
    confidence_interval: tuple[float, float]
    effect_size: float


class FairComparison:
    """Train two models alike, several times, and say whether one is better.

    Both learn to predict the bytes of the same text, in the same batches, with AdamW along half a cosine. Every seed gives new
    weights and new batches, the same to both. Each model's learning rate is the one of a grid, the same for both, with the
    smallest mean loss on the first half of the validation text; what is reported is the loss on the second half. Before that,
    numbers of parameters must differ by at most 1 %, and neither model may look ahead (:func:`check_causal`).

    Args:
        model_a, model_b: names of contestants: attention, trix, resnetbk, ssd or, where transformers and mambapy are installed,
            mamba. num_seeds: >= 5.
        contestants: (vocab_size, context_length) -> a new model, by name; besides those of ``CONTESTANTS``.
        corpus: name of a corpus or its content; all else as in any training.

    Raises:
        ValueError: fewer than 5 seeds, or no learning rate. UserError: an unknown name.

    Example::

        comparison = FairComparison("resnetbk", "ssd")
        results = comparison.run_all_benchmarks()
        comparison.save(results, "comparisons")
    """

    def __init__(
        self,
        model_a: str,
        model_b: str,
        num_seeds: int = 5,
        *,
        contestants: Mapping[str, MakeModel] | None = None,
        corpus: str | Corpus = "wikitext-2",
        num_steps: int = 300,
        batch_size: int = 16,
        context_length: int = DEFAULT_CONTEXT,
        learning_rates: Sequence[float] = (1e-3, 2e-3, 4e-3),
    ) -> None:
        known = {**CONTESTANTS, **(contestants or {})}
        for name in (model_a, model_b):
            if name not in known:
                raise UserError(f"model ({name!r}) must be one of {', '.join(known)}{did_you_mean(name, known)}")
        if num_seeds < MIN_PAIRS:
            raise ValueError(f"num_seeds ({num_seeds}) must be >= {MIN_PAIRS}")
        if not learning_rates:
            raise ValueError("number of learning_rates (0) must be >= 1")
        self.names, self.num_seeds = (model_a, model_b), num_seeds
        self._makers = [known[model_a], known[model_b]]
        self._corpus, self._num_steps, self._batch_size = corpus, num_steps, batch_size
        self._context_length, self._learning_rates = context_length, tuple(learning_rates)

    def run_all_benchmarks(self) -> dict[str, Any]:
        """``model_a`` and ``model_b``: name, parameters, ``state_floats`` (that a layer keeps of context_length tokens, see
        :func:`~lightning_modules.state_size.state_floats`), learning_rate and, in nats per byte by seed, ``losses``; and
        ``significance`` of b - a, where below 0 means that b is better.

        Raises:
            ValueError: the models differ in size, or one of them looks ahead.
        """
        corpus = load_corpus(self._corpus) if isinstance(self._corpus, str) else self._corpus
        train_N = _bytes(corpus.train_text)
        if corpus.validation_text is None:
            train_N, held_out_N = train_N[: len(train_N) * 9 // 10], train_N[len(train_N) * 9 // 10 :]
        else:
            held_out_N = _bytes(corpus.validation_text)
        if min(len(train_N) // 2, len(held_out_N) // 2) <= self._context_length:
            rule = f"must each hold more than 2 * context_length ({self._context_length}) bytes"
            raise DataError(f"training text ({len(train_N)} bytes) and validation text ({len(held_out_N)}) {rule}")
        facts = self._checked_facts()
        results: dict[str, Any] = {}
        for place, name, make, about in zip(("model_a", "model_b"), self.names, self._makers, facts, strict=True):
            losses = {
                rate: [self._losses(make, seed, rate, train_N, held_out_N) for seed in range(self.num_seeds)]
                for rate in self._learning_rates
            }
            totals = {rate: math.fsum(chosen for chosen, _ in of_rate) for rate, of_rate in losses.items()}
            best = best_rate(totals)
            reported = [loss for _, loss in losses[best]]
            results[place] = {"name": name, **about, "learning_rate": best, "losses": reported}
        significance = paired_significance(results["model_a"]["losses"], results["model_b"]["losses"])
        return results | {"significance": significance._asdict(), "num_steps": self._num_steps, "num_seeds": self.num_seeds}

    def save(self, results: Mapping[str, Any], folder: Path | str) -> None:
        """Write what :meth:`run_all_benchmarks` returned to A_vs_B.json, with the settings, the versions and the machine, and
        draw it in A_vs_B.svg; the folder is made.

        Raises:
            OSError: a file cannot be written.
        """
        corpus = self._corpus if isinstance(self._corpus, str) else self._corpus.source
        settings = {
            "corpus": corpus,
            "batch_size": self._batch_size,
            "context_length": self._context_length,
            "learning_rates": self._learning_rates,
        }
        effect = results["significance"]["effect_size"]
        finite = {"effect_size": effect if math.isfinite(effect) else None}  # JSON knows no infinity
        found = {**results, "significance": results["significance"] | finite}
        content = {"settings": settings, "environment": environment(), "results": found}
        name = "_vs_".join(self.names)
        write_whole((json.dumps(content, indent=1) + "\n").encode(), Path(folder) / f"{name}.json")
        write_whole(as_svg(self.figure(results)), Path(folder) / f"{name}.svg")

    @staticmethod
    def figure(results: Mapping[str, Any]) -> "Figure":
        """The losses of both models, a line for each seed, and their means; below, what a layer keeps of a text."""
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(5, 4), layout="constrained")
        axes = drawn.subplots()
        models = [results[place] for place in ("model_a", "model_b")]
        for seed, losses in enumerate(zip(*(model["losses"] for model in models), strict=True)):
            axes.plot([0, 1], losses, "o-", color="C0", alpha=0.5, label=None if seed else "a seed")
        means = [math.fsum(model["losses"]) / len(model["losses"]) for model in models]
        axes.plot([0, 1], means, "_", color="black", markersize=24, label="mean")
        axes.set_xticks([0, 1], [_about(model) for model in models])
        found = results["significance"]
        low, high = found["confidence_interval"]
        title = f"difference {found['mean_difference']:+.4f}, 95 %: {low:+.4f} to {high:+.4f}"
        axes.set(xlim=(-0.5, 1.5), ylabel="validation nats per byte", title=title)
        axes.grid(axis="y", alpha=0.3)
        drawn.legend(loc="outside lower center", ncols=2)
        return drawn

    def compute_statistical_significance(self, results_a: Sequence[float], results_b: Sequence[float]) -> float:
        """The p-value of :func:`paired_significance`, which has more to say."""
        return paired_significance(results_a, results_b).p_value

    def _checked_facts(self) -> list[dict[str, Any]]:
        """The number of parameters of each, and of floats in its state."""
        facts: list[dict[str, Any]] = []
        for name, make in zip(self.names, self._makers, strict=True):
            L.seed_everything(0, verbose=False)
            model = make(NUM_BYTES, self._context_length)
            size = sum(parameter.numel() for parameter in model.parameters())
            check_causal(model, name, NUM_BYTES, min(self._context_length, 32))
            facts.append({"parameters": size, "state_floats": state_floats(model, self._context_length)})
        sizes = [about["parameters"] for about in facts]
        if max(sizes) > MAX_SIZE_RATIO * min(sizes):
            raise ValueError(
                f"parameters of {self.names[1]} ({sizes[1]}) must be within 1 % of those of {self.names[0]} ({sizes[0]})"
            )
        return facts

    def _losses(self, make: MakeModel, seed: int, rate: float, train_N: Tensor, held_out_N: Tensor) -> tuple[float, float]:
        """Train once; the losses on the half that chooses the rate, and on the one that is reported."""
        length = self._context_length + 1
        draw = torch.Generator().manual_seed(seed)
        start = torch.randint(0, len(train_N) - length + 1, (self._num_steps * self._batch_size,), generator=draw)
        windows: Any = [train_N[head : head + length] for head in start.tolist()]
        L.seed_everything(seed, verbose=False)
        model = make(NUM_BYTES, self._context_length)
        optimizer = AdamW(model.parameters(), lr=rate)
        plain = {"num_epochs": 1, "warmup_steps": 0, "gradient_checkpointing": False, "mixed_precision": False}
        never = dict.fromkeys(("log_interval", "eval_interval", "save_interval"), self._num_steps + 1)
        loader: DataLoader[Any] = DataLoader(windows, self._batch_size)
        Trainer(model, loader, loader, optimizer, default_lr_scheduler(optimizer, self._num_steps), plain | never).train_epoch(
            0
        )
        halves = held_out_N[: len(held_out_N) // 2], held_out_N[len(held_out_N) // 2 :]
        measured = [total_nats(model, half, NUM_BYTES, self._context_length, self._context_length, 32) for half in halves]
        chosen, reported = (nats / num_tokens for nats, num_tokens in measured)
        return chosen, reported


def paired_significance(results_a: Sequence[float], results_b: Sequence[float], min_pairs: int = MIN_PAIRS) -> Significance:
    """scipy's paired t-test of what two models reached with the same seeds, and how much they differ.

    Where all differences are equal there is nothing to estimate: the p-value is 1 if they are 0, else 0.

    Args:
        min_pairs: pairs below which there is no answer, >= 2.

    Raises:
        ValueError: numbers of results differ, are below min_pairs, or a result is not finite.
    """
    if len(results_a) != len(results_b):
        raise ValueError(f"number of results_a ({len(results_a)}) must equal that of results_b ({len(results_b)})")
    if len(results_a) < min_pairs:
        raise ValueError(f"number of paired results ({len(results_a)}) must be >= {min_pairs}")
    a, b = np.asarray(results_a, dtype=np.float64), np.asarray(results_b, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"results ({[*results_a]} and {[*results_b]}) must be finite")
    difference = b - a
    mean, spread = float(difference.mean()), float(difference.std(ddof=1))
    if spread == 0.0:
        return Significance(float(mean == 0.0), mean, (mean, mean), 0.0 if mean == 0.0 else math.copysign(math.inf, mean))
    test = stats.ttest_rel(b, a)
    interval = test.confidence_interval(CONFIDENCE)
    return Significance(float(test.pvalue), mean, (float(interval.low), float(interval.high)), mean / spread)


def best_rate(loss_of: Mapping[float, float]) -> float:
    """The learning rate with the least loss, of losses by rate; one that is not a number counts as the largest."""
    return min(loss_of, key=lambda rate: math.inf if math.isnan(loss_of[rate]) else loss_of[rate])


@torch.no_grad()
def check_causal(model: nn.Module, name: str, vocab_size: int, length: int) -> bool:
    """Raise ValueError where tokens that are edited move a logit before them, in any of several places.

    Logits that are not bitwise equal are computed again in float64, where sums of another order come to less than 1e-9.
    Returns whether all are bitwise equal.
    """
    is_bitwise = True
    exact = copy.deepcopy(model).double().eval()
    was_training = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    token_BT, other_BT = torch.randint(0, vocab_size, (2, 2, length), generator=draw).to(device)
    try:
        for place in sorted({1, length // 3, length // 2, length - 1} - {0}):
            edited_BT = torch.cat([token_BT[:, :place], other_BT[:, place:]], dim=1)
            before, after = (logits_of(model(token))[:, :place] for token in (token_BT, edited_BT))
            if torch.equal(before, after):
                continue
            is_bitwise = False
            before, after = (logits_of(exact(token))[:, :place] for token in (token_BT, edited_BT))
            move = float((before - after).abs().max())
            if not move <= MAX_MOVE:
                raise ValueError(f"logits of {name} before token {place} must not depend on it: they move by {move:.3g}")
    finally:
        model.train(was_training)
    return is_bitwise


@torch.no_grad()
def total_nats(
    model: nn.Module, token_N: Tensor, vocab_size: int, context_length: int, stride: int, batch_size: int
) -> tuple[float, int]:
    """The nats of all tokens of a text after the first, each predicted once, and their number, N - 1.

    Windows of context_length tokens begin every stride tokens; the last one ends with the text. In each, what an earlier one
    has predicted counts as context alone.

    Raises:
        ValueError: batch_size < 1, or the model's logits are fewer than vocab_size.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be >= 1")
    num_targets = len(token_N) - 1
    length = min(context_length, num_targets)
    heads = [*range(0, num_targets - length, stride), num_targets - length]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    nats, num_done = 0.0, 0
    try:
        size = logits_of(model(token_N.new_zeros(1, 1).to(device))).shape[-1]
        if size < vocab_size:
            raise ValueError(f"vocab_size of the model ({size}) must be >= that of the text ({vocab_size})")
        for first in range(0, len(heads), batch_size):
            head_B = torch.tensor(heads[first : first + batch_size])
            place_BT = head_B[:, None] + torch.arange(length)
            logits = logits_of(model(token_N[place_BT].to(device)))
            loss_BT = F.cross_entropy(logits.mT, token_N[place_BT + 1].to(device), reduction="none").double().cpu()
            done_B = torch.cat([torch.tensor([num_done]), head_B[:-1] + length])
            nats += float(loss_BT[place_BT >= done_B[:, None]].sum())
            num_done = int(head_B[-1]) + length
    finally:
        model.train(was_training)
    return nats, num_targets


def _about(model: Mapping[str, Any]) -> str:
    state = model.get("state_floats")
    kept = "not known" if state is None else f"{state:,.0f} floats"
    return f"{model['name']}\nrate {model['learning_rate']:g}\nstate {kept}"


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def _by_frequency(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for word, _ in Counter(words).most_common())


def _token_ids(words: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    place = {word: index for index, word in enumerate(vocabulary)}
    missing = next((word for word in words if word not in place), None)
    if missing is not None and UNKNOWN not in place:
        raise DataError(f"vocabulary ({len(vocabulary)} words) must hold {missing!r}, or {UNKNOWN} for unknown words")
    return torch.tensor([place.get(word, place.get(UNKNOWN, 0)) for word in words])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
