"""Perplexity per word, each token predicted once; comparisons in pairs, of models that do not look ahead."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_modules.comparison import (
    CONTESTANTS,
    FairComparison,
    WikiText2Benchmark,
    check_causal,
    paired_significance,
    total_nats,
)
from lightning_modules.data.corpora import Corpus
from lightning_modules.errors import DataError, UserError

TEXT = " = Title = \n\n The cat sat on the mat . \n A dog <unk> by é \n"
LINE: Any = "line"
WORDS = [word for line in TEXT.split("\n")[:-1] for word in (*line.split(), "<eos>")]


class Bigrams(nn.Module):
    """Logits that depend on the token at hand."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Sums(nn.Module):
    """Logits that depend on all tokens up to the one at hand, or, where it leaks, on all tokens of the window."""

    def __init__(self, vocab_size: int, is_leaking: bool = False) -> None:
        super().__init__()
        self.embedding, self.is_leaking = nn.Embedding(vocab_size, vocab_size), is_leaking

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return x.cumsum(dim=1) + (1e-6 * x.sum(dim=1, keepdim=True) if self.is_leaking else 0.0)


class Wrapped(NamedTuple):
    logits: Tensor


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def uniform(vocab_size: int) -> nn.Module:
    model = Bigrams(vocab_size)
    nn.init.zeros_(model.table.weight)
    return model


def test_words_are_those_of_the_literature(text: Path) -> None:
    benchmark = WikiText2Benchmark(text)
    assert benchmark.vocabulary is not None
    assert [benchmark.vocabulary[index] for index in benchmark.token_N] == WORDS
    assert benchmark.vocabulary[0] == "<eos>"  # the most frequent
    known = WikiText2Benchmark(text, vocabulary=["<unk>", "cat"])
    assert known.token_N.tolist() == [int(word == "cat") for word in WORDS]


def test_perplexity_is_per_word_whatever_the_unit(text: Path) -> None:
    by_word = WikiText2Benchmark(text, context_length=4).evaluate(uniform(20))
    num_words, num_bytes = len(WORDS), len(TEXT.encode())
    assert by_word["loss"] == pytest.approx(math.log(20), rel=1e-6)
    assert by_word["perplexity"] == pytest.approx(20 ** ((num_words - 1) / num_words), rel=1e-6)
    assert by_word["token_perplexity"] == pytest.approx(20, rel=1e-6)
    expected = {"unit": "word", "num_tokens": num_words - 1, "num_words": num_words, "context_length": 4, "stride": 2}
    assert {name: by_word[name] for name in expected} == expected
    by_byte = WikiText2Benchmark(text, unit="byte").evaluate(uniform(256))
    assert by_byte["perplexity"] == pytest.approx(256 ** ((num_bytes - 1) / num_words), rel=1e-5)
    assert by_byte["bits_per_byte"] == pytest.approx(8 * (num_bytes - 1) / num_bytes, rel=1e-6)
    assert by_byte["num_tokens"] == num_bytes - 1


@pytest.mark.parametrize(("context_length", "stride"), [(7, 7), (7, 3), (7, 1), (1, 1), (40, 40), (39, 2), (100, 50)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_predicted_once_from_what_the_windows_hold(context_length: int, stride: int, batch_size: int) -> None:
    torch.manual_seed(0)
    token_N, model = torch.randint(0, 5, (40,)), Sums(5).double()
    nats, num_tokens = total_nats(model, token_N, 5, context_length, stride, batch_size)
    expected, done, head = 0.0, 0, 0
    while done < 39:
        head = min(head, max(0, 39 - context_length))
        end = min(head + context_length, 39)
        log_p = model(token_N[None, head:end])[0].log_softmax(-1)
        expected -= sum(float(log_p[place - head, token_N[place + 1]]) for place in range(done, end))
        done, head = end, head + stride
    assert num_tokens == 39
    assert nats == pytest.approx(expected, rel=1e-12)
    assert model.training


def test_what_a_model_answers_may_hold_its_logits(text: Path) -> None:
    class Model(Bigrams):
        def forward(self, input_ids: Tensor) -> Any:
            return Wrapped(super().forward(input_ids))

    torch.manual_seed(0)
    model = Model(20)
    plain = Bigrams(20)
    plain.load_state_dict(model.state_dict())
    benchmark = WikiText2Benchmark(text)
    assert benchmark.evaluate(model, batch_size=2) == benchmark.evaluate(plain, batch_size=2)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda path: WikiText2Benchmark(path).evaluate(uniform(3)), r"vocab_size of the model \(3\) must be >= .*text \(15\)"),
        (lambda path: WikiText2Benchmark(path, stride=200), r"stride \(200\) must be >= 1 and <= context_length \(128\)"),
        (lambda path: WikiText2Benchmark(path, unit=LINE), r"unit \('line'\) must be one of word, byte"),
        (lambda path: WikiText2Benchmark(path, split="train"), r"split \('train'\) must be one of test, valid"),
        (lambda path: WikiText2Benchmark(path, vocabulary=["cat"]), r"vocabulary \(1 words\) must hold '='"),
        (lambda path: WikiText2Benchmark(path).evaluate(uniform(16), 0), r"batch_size \(0\) must be >= 1"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(run: Callable[[Path], Any], message: str, text: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(text)


def test_wikitext_has_its_known_numbers_of_words() -> None:
    try:
        counts = [WikiText2Benchmark(split=split).num_words for split in ("test", "valid")]
    except DataError:
        pytest.skip("TRIX_DATA_DIR names no folder with WikiText-2")
    assert counts == [245_569, 217_646]


def test_a_model_that_looks_ahead_is_refused() -> None:
    assert check_causal(Sums(7), "sums", 7, 12)
    with pytest.raises(ValueError, match=r"logits of leaking before token 1 must not depend on it: they move by \d"):
        check_causal(Sums(7, is_leaking=True), "leaking", 7, 12)


OPTIONAL = {"mamba": ("transformers", "mambapy")}


def contestant(name: str, context_length: int) -> nn.Module:
    for package in OPTIONAL.get(name, ()):
        pytest.importorskip(package)
    return CONTESTANTS[name](256, context_length)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_no_contestant_looks_ahead(name: str) -> None:
    torch.manual_seed(0)
    assert check_causal(contestant(name, 16), name, 256, 16)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_are_of_one_size(name: str) -> None:
    size = sum(parameter.numel() for parameter in contestant(name, 128).parameters())
    assert 114_500 <= size <= 115_100  # less than 1 % apart


def test_a_contestant_of_packages_that_are_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mambapy", None)
    with pytest.raises(UserError, match=r"model \('mamba'\) needs transformers and mambapy: pip install"):
        FairComparison("resnetbk", "mamba", corpus=SHORT["corpus"], context_length=8).run_all_benchmarks()


def test_the_test_is_that_of_scipy_and_says_how_much() -> None:
    a, b = [2.0, 2.1, 1.9, 2.2, 2.05], [1.9, 2.05, 1.7, 2.1, 2.0]
    found = paired_significance(a, b)
    assert found.p_value == pytest.approx(float(stats.ttest_rel(b, a).pvalue))
    assert found.mean_difference == pytest.approx(-0.1)
    difference = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    half = float(stats.t.ppf(0.975, 4)) * float(difference.std()) / math.sqrt(5)
    assert found.confidence_interval == pytest.approx((-0.1 - half, -0.1 + half))
    assert found.effect_size == pytest.approx(-0.1 / float(difference.std()))
    assert FairComparison("trix", "attention").compute_statistical_significance(a, b) == found.p_value
    assert paired_significance(a, a) == (1.0, 0.0, (0.0, 0.0), 0.0)
    assert paired_significance([0.0] * 5, [1.0] * 5) == (0.0, 1.0, (1.0, 1.0), math.inf)
    assert paired_significance(a[:2], b[:2], min_pairs=2).mean_difference == pytest.approx(-0.075)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0] * 4, [1.0] * 4, r"number of paired results \(4\) must be >= 5"),
        ([1.0] * 5, [1.0] * 6, r"number of results_a \(5\) must equal that of results_b \(6\)"),
        ([1.0] * 5, [1.0] * 4 + [math.nan], r"results \(.*nan.*\) must be finite"),
    ],
)
def test_results_are_checked(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_significance(a, b)


class OnlyTheLast(Bigrams):
    """As large as Bigrams, but unable to learn from the token at hand."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(torch.zeros_like(input_ids))


SHORT: dict[str, Any] = {
    "corpus": Corpus("text", "abcdefgh" * 60, "abcdefgh" * 20, ""),
    "num_steps": 12,
    "batch_size": 4,
    "context_length": 8,
}
OWN = {
    "bigrams": lambda vocab_size, context_length: Bigrams(vocab_size),  # noqa: ARG005
    "unigrams": lambda vocab_size, context_length: OnlyTheLast(vocab_size),  # noqa: ARG005
    "leaking": lambda vocab_size, context_length: Sums(vocab_size, is_leaking=True),  # noqa: ARG005
    "small": lambda vocab_size, context_length: nn.Sequential(nn.Embedding(vocab_size, 4), nn.Linear(4, vocab_size)),  # noqa: ARG005
}


def compare(a: str, b: str, **settings: Any) -> dict[str, Any]:
    return FairComparison(a, b, contestants=OWN, **(SHORT | {"learning_rates": (0.01, 0.3)} | settings)).run_all_benchmarks()


def test_the_better_model_is_found_at_its_own_rate() -> None:
    results = compare("unigrams", "bigrams")
    assert [results[place]["name"] for place in ("model_a", "model_b")] == ["unigrams", "bigrams"]
    assert results["model_b"]["learning_rate"] == 0.3
    assert results["model_a"]["parameters"] == results["model_b"]["parameters"] == 256**2
    assert results["significance"]["mean_difference"] < -0.5
    assert results["significance"]["p_value"] < 0.01
    assert len(set(results["model_b"]["losses"])) == 5  # other weights and batches with every seed


def test_each_loss_comes_with_the_state_that_it_took() -> None:
    results = compare("ssd", "attention", num_steps=1, learning_rates=(1e-3,))
    assert results["model_b"]["state_floats"] == 2 * 8 * 64  # keys and values of 8 tokens
    assert results["model_a"]["state_floats"] == 16 * 64 + 3 * (64 + 2 * 16)
    assert compare("bigrams", "bigrams", num_steps=1, learning_rates=(0.3,))["model_a"]["state_floats"] is None


def test_a_model_equals_itself() -> None:
    results = compare("bigrams", "bigrams", learning_rates=(0.3,))
    assert results["model_a"] == results["model_b"]
    assert results["significance"]["p_value"] == 1.0
    more = compare("bigrams", "bigrams", learning_rates=(0.3,), num_seeds=6)
    assert more["model_a"]["losses"][:5] == results["model_a"]["losses"]
    assert len(more["model_a"]["losses"]) == more["num_seeds"] == 6


def test_a_comparison_is_recorded_and_drawn(tmp_path: Path) -> None:
    comparison = FairComparison("unigrams", "bigrams", contestants=OWN, **SHORT)
    losses = {"unigrams": [2.0, 2.1, 1.9, 2.2, 2.05], "bigrams": [1.9, 2.05, 1.7, 2.1, 2.0]}
    about = {"parameters": 9, "learning_rate": 2e-3}
    state = {"unigrams": None, "bigrams": 1234.0}
    models = [{"name": name, **about, "state_floats": state[name], "losses": losses[name]} for name in losses]
    found = paired_significance(*losses.values())._asdict()
    results = {"model_a": models[0], "model_b": models[1], "significance": found, "num_steps": 12, "num_seeds": 5}
    comparison.save(results, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"unigrams_vs_bigrams.json", "unigrams_vs_bigrams.svg"}
    record = json.loads((tmp_path / "new" / "unigrams_vs_bigrams.json").read_text())
    assert record["results"]["model_b"] == models[1]
    assert record["settings"] == {"corpus": "text", "batch_size": 4, "context_length": 8, "learning_rates": [1e-3, 2e-3, 4e-3]}
    assert record["environment"]["packages"]["torch"] == torch.__version__
    axes = comparison.figure(results).axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert drawn == [*map(list, zip(*losses.values(), strict=True)), [pytest.approx(2.05), pytest.approx(1.95)]]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["unigrams\nrate 0.002\nstate not known", "bigrams\nrate 0.002\nstate 1,234 floats"]
    assert axes.get_title().startswith("difference -0.1000, 95 %: -0.1")
    comparison.save(results | {"significance": found | {"effect_size": math.inf}}, tmp_path)
    assert '"effect_size": null' in (tmp_path / "unigrams_vs_bigrams.json").read_text()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"b": "leaking"}, ValueError, r"logits of leaking before token 1 must not depend on it"),
        ({"b": "small"}, ValueError, r"parameters of small \(2304\) must be within 1 % of those of bigrams \(65536\)"),
        ({"b": "bigram"}, UserError, r"model \('bigram'\) must be one of .*; did you mean bigrams\?"),
        ({"b": "bigrams", "num_seeds": 4}, ValueError, r"num_seeds \(4\) must be >= 5"),
        ({"b": "bigrams", "learning_rates": ()}, ValueError, r"number of learning_rates \(0\) must be >= 1"),
        (
            {"b": "bigrams", "context_length": 90},
            DataError,
            r"validation text \(160\) must each hold more than 2 \* context_length",
        ),
    ],
)
def test_an_unfair_comparison_is_refused(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compare("bigrams", **settings)
