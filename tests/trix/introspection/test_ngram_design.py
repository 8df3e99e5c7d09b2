"""A designed signature claims the n-grams that it is for, and what is said of it beforehand comes true."""

import copy
from typing import Any

import pytest
import torch

from trix.introspection import TriXIntrospector
from trix.introspection.ngram_design import design_signature, forecast
from trix.introspection.ngrams import NgramReader, Ngrams, all_ngrams, count_ngrams
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

V, D = 20, 64
KINDS: list[dict[str, Any]] = [
    {},
    {"context_tokens": 3},
    {"kind": "hierarchical"},
    {"kind": "sparse_lookup_v2"},
    {"routing": "emergent"},
    {"top_k": 2},
    {"max_k": 4},
]


def context_model(**settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    ffn = FFNConfig(**({"num_tiles": 16, "route_on": "context"} | settings))
    model = LanguageModel(V, LanguageModelConfig(D, 2, 2, 32, ffn=ffn)).eval()
    for layer in NgramReader(model).layers:
        torch.nn.init.normal_(layer.router.balance_bias, std=0.2)
    return model


def text() -> torch.Tensor:
    """Small ids are frequent."""
    draw = torch.Generator().manual_seed(0)
    return (torch.rand(40, 32, generator=draw).square() * V).long()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_designed_signature_claims_what_it_is_for_and_little_else(settings: dict[str, Any]) -> None:
    reader, token_BT = NgramReader(context_model(**settings)), text()
    ngrams = count_ngrams(token_BT, reader.num_tokens)
    wanted_MJ = ngrams.id_NJ[ngrams.count_N.argsort(descending=True)[:60:20]]
    for layer in range(2):
        signature_D = design_signature(reader, layer, 5, wanted_MJ, ngrams)
        assert signature_D.shape == (D,)
        assert set(signature_D.tolist()) <= {-1, 0, 1}
        seen = forecast(reader, layer, 5, signature_D, wanted_MJ, ngrams)
        assert seen.claims_wanted().all()
        assert sum(share for _, share in seen.others()) < (
            0.1 if settings.keys() & {"context_tokens", "top_k", "max_k"} else 0.05
        )


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_forecast_comes_true(settings: dict[str, Any]) -> None:
    model, token_BT = context_model(**settings), text()
    reader = NgramReader(model)
    ngrams = count_ngrams(token_BT, reader.num_tokens)
    wanted_MJ = ngrams.id_NJ[[3, 11]]
    signature_D = design_signature(reader, 1, 5, wanted_MJ, ngrams)
    state = copy.deepcopy(model.state_dict())
    seen = forecast(reader, 1, 5, signature_D, wanted_MJ, ngrams)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    was = TriXIntrospector(model).decision(token_BT, 1)
    reader.layers[1].insert_signature(5, signature_D)
    now_E = TriXIntrospector(model).routing_distribution(token_BT, 1)
    now = TriXIntrospector(model).decision(token_BT, 1)
    torch.testing.assert_close(seen.after.rates(), now_E.double(), atol=1e-6, rtol=0.0)
    had_T, has_T = (((decision.tile_idx == 5) & (decision.weight != 0)).any(dim=-1) for decision in (was, now))
    from_E = torch.bincount(was.tile_idx[has_T & ~had_T, 0], minlength=16) / len(has_T)
    assert dict(seen.taken_from()) == pytest.approx({e: float(from_E[e]) for e in from_E.nonzero().flatten().tolist()})
    assert seen.given_up() == pytest.approx(float((had_T & ~has_T).float().mean()))


def test_what_the_text_lacks_can_be_wanted_and_a_removed_tile_comes_back() -> None:
    reader = NgramReader(context_model())
    reader.layers[0].unfreeze_signature(5)
    reader.layers[0].remove_tile(5)
    ngrams = count_ngrams(torch.tensor([[0, 1, 2, 3]]), 2)
    wanted_MJ = torch.tensor([[9, 7], [7, 9]])
    signature_D = design_signature(reader, 0, 5, wanted_MJ, ngrams)
    seen = forecast(reader, 0, 5, signature_D, wanted_MJ, ngrams)
    assert seen.claims_wanted().tolist() == [True, True]
    assert seen.given_up() == 0
    assert {0, 1, 2, 3}.isdisjoint(seen.after.ngrams.id_NJ[seen.wanted_M].flatten().tolist())


def test_without_a_text_all_ngrams_can_be_told_apart() -> None:
    reader, ngrams = NgramReader(context_model()), all_ngrams(V, 2)
    wanted_MJ = torch.tensor([[3, 4]])
    seen = forecast(reader, 0, 2, design_signature(reader, 0, 2, wanted_MJ, ngrams), wanted_MJ, ngrams)
    assert seen.claims_wanted().all()
    assert len(seen.others()) < V * V / 50


@pytest.mark.parametrize("settings", [{"num_tiles": 1}, {"num_tiles": 2, "top_k": 2}], ids=str)
def test_where_there_is_no_rival_all_is_claimed(settings: dict[str, int]) -> None:
    reader, ngrams = NgramReader(context_model(**settings)), all_ngrams(V, 2)
    wanted_MJ = ngrams.id_NJ[:1]
    seen = forecast(reader, 0, 0, design_signature(reader, 0, 0, wanted_MJ, ngrams), wanted_MJ, ngrams)
    assert seen.after.is_claimed(0).all()
    assert seen.taken_from() == []


def test_what_has_no_signature_to_design() -> None:
    ngrams = Ngrams(torch.tensor([[1, 2]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="a router of type LearnedRouter has no signatures to design"):
        design_signature(NgramReader(context_model(routing="learned")), 0, 2, ngrams.id_NJ, ngrams)
    with pytest.raises(ValueError, match=r"tile_idx \(16\) must be >= 0 and < num_tiles \(16\)"):
        design_signature(NgramReader(context_model()), 0, 16, ngrams.id_NJ, ngrams)
