"""N-grams: counted as a code reads them, and sent where the model sends them."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.introspection import TriXIntrospector
from trix.introspection.ngrams import (
    NO_TOKEN,
    NOT_AMONG,
    NgramReader,
    Ngrams,
    all_ngrams,
    count_ngrams,
    is_among,
    joined,
    ngrams_at,
    places_among,
    routes_on_context,
)
from trix.nn import Classifier, ClassifierConfig, FFNConfig, LanguageModel, LanguageModelConfig
from trix.routing.router import LearnedRouter

V, D = 11, 32
KINDS: list[dict[str, Any]] = [
    {},
    {"context_tokens": 3, "context_decay": 0.6},
    {"context_tokens": 1},
    {"kind": "hierarchical"},
    {"kind": "sparse_lookup_v2"},
    {"routing": "emergent"},
    {"routing": "learned"},
    {"routing": f"{__name__}.Unexplained"},
    {"top_k": 2},
    {"max_k": 2},
]


class Unexplained(LearnedRouter):
    """Reads codes, but names no directions."""

    def explain(self, emergent_ED: torch.Tensor | None = None) -> None:
        del emergent_ED


def context_model(**settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    ffn = FFNConfig(**({"num_tiles": 8, "route_on": "context"} | settings))
    model = LanguageModel(V, LanguageModelConfig(D, 2, 2, 24, ffn=ffn)).eval()
    for layer in NgramReader(model).layers:
        torch.nn.init.normal_(layer.router.balance_bias, std=0.2)
    return model


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (5, 24), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_counts_are_those_of_a_loop(tokens: list[list[int]], num_tokens: int, data: st.DataObject) -> None:
    mask = [data.draw(st.lists(st.booleans(), min_size=6, max_size=6)) for _ in tokens]
    expected: Counter[tuple[int, ...]] = Counter()
    for token_T, mask_T in zip(tokens, mask, strict=True):
        kept = [token if is_kept else NO_TOKEN for token, is_kept in zip(token_T, mask_T, strict=True)]
        for place, is_kept in enumerate(mask_T):
            if is_kept:
                expected[tuple(([NO_TOKEN] * num_tokens + kept[: place + 1])[-num_tokens:])] += 1
    ngrams = count_ngrams(torch.tensor(tokens), num_tokens, torch.tensor(mask))
    assert {tuple(ids): count for ids, count in zip(ngrams.id_NJ.tolist(), ngrams.count_N.tolist(), strict=True)} == expected


def test_counts_of_parts_add_up() -> None:
    parts = [count_ngrams(text(seed), 2) for seed in range(3)]
    whole = count_ngrams(torch.cat([text(seed) for seed in range(3)]), 2)
    assert all(torch.equal(one, other) for one, other in zip(joined(parts), whole, strict=True))


def test_places_are_those_of_a_loop() -> None:
    ngrams, id_MJ = count_ngrams(text(), 2), ngrams_at(text(1), 2)
    rows = ngrams.id_NJ.flip(0).tolist()
    expected = [rows.index(ids) if ids in rows else NOT_AMONG for ids in id_MJ.tolist()]
    assert NOT_AMONG in expected
    assert places_among(id_MJ, ngrams.id_NJ.flip(0)).tolist() == expected
    assert is_among(id_MJ, ngrams.id_NJ).tolist() == [place != NOT_AMONG for place in expected]


def test_all_ngrams_are_each_there_once() -> None:
    ngrams = all_ngrams(3, 2)
    assert ngrams.id_NJ.tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert all_ngrams(4, 1).id_NJ.tolist() == [[0], [1], [2], [3]]
    with pytest.raises(ValueError, match=r"number of n-grams \(1025\^2\) must be <= 1048576"):
        all_ngrams(1025, 2)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_tile_of_an_ngram_is_the_models_in_a_running_text(settings: dict[str, Any]) -> None:
    model = context_model(**settings)
    reader, token_BT = NgramReader(model), text()
    _, infos, _ = model(token_BT, return_routing=True)
    id_NJ = ngrams_at(token_BT, reader.num_tokens)
    for layer, info in enumerate(infos):
        decision = reader.decide(id_NJ, layer)
        assert torch.equal(decision.tile_idx, info["tile_idx"].reshape(len(id_NJ), -1))
        torch.testing.assert_close(decision.score, info["scores"].reshape(len(id_NJ), -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_predicted_claim_rate_is_the_measured_one(settings: dict[str, Any]) -> None:
    model = context_model(**settings)
    reader, introspector, token_BT = NgramReader(model), TriXIntrospector(model), text()
    capture = introspector.capture(token_BT.split(2))
    for layer in range(2):
        claims = reader.claims(count_ngrams(token_BT, reader.num_tokens), layer)
        measured_E = introspector.routing_distribution(capture, layer)
        torch.testing.assert_close(claims.rates(), measured_E.double(), atol=1e-6, rtol=0.0)
        assert claims.num_tokens == token_BT.numel()
        for tile in range(8):
            of_tile = claims.of_tile(tile)
            shares = [share for _, share in of_tile]
            assert shares == sorted(shares, reverse=True)
            if settings.keys().isdisjoint({"top_k", "max_k"}):
                assert sum(shares) == pytest.approx(float(measured_E[tile]), abs=1e-6)
            assert claims.of_tile(tile, 2) == of_tile[:2]


def test_padding_takes_no_part() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(D, 2, 2, 24, ffn=FFNConfig(num_tiles=8, route_on="context"))
    model = Classifier(None, 3, config, vocab_size=V).eval()
    token_BT = text().clamp_min(1)
    token_BT[1:, 10:] = 0
    reader, introspector = NgramReader(model), TriXIntrospector(model)
    ngrams = count_ngrams(token_BT, 2, model.padding_mask(token_BT))
    for layer in range(2):
        measured_E = introspector.routing_distribution(token_BT, layer)
        torch.testing.assert_close(reader.claims(ngrams, layer).rates(), measured_E.double(), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("settings", [{}, {"context_tokens": 3}, {"routing": "learned"}, {"kind": "sparse_lookup"}], ids=str)
def test_contributions_of_tokens_and_biases_sum_to_the_difference_of_the_scores(settings: dict[str, Any]) -> None:
    model = context_model(**settings)
    reader, token_BT = NgramReader(model), text()[:1]
    id_TJ = ngrams_at(token_BT, reader.num_tokens)
    for layer in range(2):
        explanations = TriXIntrospector(model).why(token_BT, layer)
        winner_T = torch.tensor([e.tile_idx for e in explanations])
        rival_T = torch.tensor([e.runner_up_idx for e in explanations])
        part_TJ = reader.contributions(id_TJ, winner_T, rival_T, layer)
        assert not part_TJ[id_TJ == NO_TOKEN].any()
        for e, total in zip(explanations, part_TJ.sum(dim=1).tolist(), strict=True):
            assert total + e.bias - e.runner_up_bias == pytest.approx(e.score - e.runner_up_score, abs=1e-4)


def test_without_a_text_nothing_is_claimed() -> None:
    claims = NgramReader(context_model()).claims(Ngrams(torch.tensor([[1, 2]]), torch.tensor([0])))
    assert claims.rates().sum() == 0
    assert claims.shares().tolist() == [0.0]


def test_what_cannot_be_read() -> None:
    model = LanguageModel(V, LanguageModelConfig(D, 1, 2, 24, ffn=FFNConfig(num_tiles=4)))
    assert not routes_on_context(model)
    with pytest.raises(ValueError, match=r"the model must route on context \(route_on: context\)"):
        NgramReader(model)
    reader = NgramReader(context_model(routing=f"{__name__}.Unexplained"))
    with pytest.raises(ValueError, match=r"layer \(2\) must be >= 0 and < number of routed layers \(2\)"):
        reader.decide(torch.tensor([[1, 2]]), 2)
    with pytest.raises(ValueError, match="routed by a Unexplained, which has no directions to explain a choice by"):
        reader.contributions(torch.tensor([[1, 2]]), torch.tensor([0]), torch.tensor([1]))
