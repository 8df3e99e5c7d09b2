"""Codes of the last few tokens: their formula, where they begin, that nothing moves them, and models that route on them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.nn import Classifier, ClassifierConfig, ContextCode, FFNConfig, LanguageModel, LanguageModelConfig, TriXBlock
from trix.nn.routed_layer import routed_layers

V, D = 11, 32


def reference(code: ContextCode, token_T: list[int]) -> Tensor:
    """The formula, token by token."""
    rows = []
    for place in range(len(token_T)):
        total_D = torch.zeros(code.table_VD.shape[1], dtype=torch.float64)
        for back in range(min(code.num_tokens, place + 1)):
            row_D = code.table_VD[token_T[place - back]].double()
            total_D += code.decay**back * torch.cat([row_D[-7 * back :], row_D[: -7 * back]]) if back else row_D
        rows.append(total_D / (total_D.square().mean() + torch.finfo(torch.float32).eps).sqrt())
    return torch.stack(rows)


@settings(deadline=None)  # the first comparison imports what torch compares with
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), st.integers(1, 4), st.sampled_from([0.5, 0.8, 1.0]))
def test_a_code_is_the_formula(token_T: list[int], num_tokens: int, decay: float) -> None:
    code = ContextCode(V, D, num_tokens, decay)
    code_BTD, _ = code(torch.tensor([token_T]))
    torch.testing.assert_close(code_BTD[0].double(), reference(code, token_T), atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(0, V - 1), min_size=2, max_size=9), st.integers(1, 4), st.data())
def test_a_text_in_pieces_has_the_codes_of_the_whole(token_T: list[int], num_tokens: int, data: st.DataObject) -> None:
    code, token_BT = ContextCode(V, D, num_tokens), torch.tensor([token_T])
    cut = data.draw(st.integers(1, len(token_T) - 1))
    whole_BTD, last = code(token_BT)
    first_BTD, state = code(token_BT[:, :cut], state=code.empty_state(1))
    second_BTD, state = code(token_BT[:, cut:], state=state)
    assert torch.equal(torch.cat([first_BTD, second_BTD], dim=1), whole_BTD)
    assert [part.tolist() for part in state] == [part.tolist() for part in last]
    assert [part.shape for part in state] == [(1, spec.shape[1]) for spec in code.state_specs()]


@given(st.integers(0, 3), st.integers(1, 4))
def test_padding_on_the_left_changes_no_code_of_a_token(num_padding: int, num_tokens: int) -> None:
    code, token_BT = ContextCode(V, D, num_tokens), torch.tensor([[3, 1, 4, 1, 5]])
    padded_BT = torch.cat([torch.full((1, num_padding), 9), token_BT], dim=1)
    mask_BT = torch.arange(padded_BT.shape[1]) >= num_padding
    padded_BTD, _ = code(padded_BT, mask_BT.expand_as(padded_BT))
    assert torch.equal(padded_BTD[:, num_padding:], code(token_BT)[0])
    assert not padded_BTD[:, :num_padding].any()


def test_nothing_draws_or_moves_a_code() -> None:
    before = torch.get_rng_state()
    code = ContextCode(V, D)
    assert torch.equal(before, torch.get_rng_state())
    assert not list(code.parameters())
    torch.manual_seed(5)
    assert torch.equal(code.table_VD, ContextCode(V, D).table_VD)
    assert set(code.state_dict()) == {"table_VD"}
    assert code(torch.zeros(1, 2, dtype=torch.int64))[0].grad_fn is None


def test_affinities_add_up_to_the_scores() -> None:
    code, direction_ED = ContextCode(V, D, 3), torch.randn(5, D)
    affinity_EJV = code.affinities(direction_ED)
    token_T = [7, 2, 4]
    code_D = code(torch.tensor([token_T]))[0][0, -1]
    sum_D = sum(code._weighted(back)[token_T[2 - back]] for back in range(3))
    assert isinstance(sum_D, Tensor)
    score_E = sum(affinity_EJV[:, back, token_T[2 - back]] for back in range(3)) / sum_D.square().mean().sqrt()
    torch.testing.assert_close(score_E, direction_ED @ code_D, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size \(0\) and d_model \(32\) must be >= 1"),
        ({"num_tokens": 0}, r"context_tokens \(0\) must be >= 1 and <= 5 with d_model 32"),
        ({"num_tokens": 6}, r"context_tokens \(6\) must be >= 1 and <= 5 with d_model 32"),
        ({"decay": 0.0}, r"context_decay \(0.0\) must be > 0 and <= 1"),
        ({"decay": float("nan")}, r"context_decay \(nan\) must be > 0 and <= 1"),
    ],
)
def test_what_cannot_be(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextCode(**{"vocab_size": V, "d_model": D, **arguments})  # type: ignore[arg-type]


def context_model(**settings: Any) -> LanguageModel:
    torch.manual_seed(0)
    ffn = FFNConfig(**{"num_tiles": 8, "route_on": "context", "balance_rate": 0.0} | settings)
    return LanguageModel(V, LanguageModelConfig(D, 2, 2, 16, ffn=ffn))


@pytest.mark.parametrize("settings", [{}, {"kind": "hierarchical"}, {"kind": "sparse_lookup"}, {"routing": "learned"}], ids=str)
def test_tokens_with_the_same_pair_go_to_the_same_tile_in_any_text(settings: dict[str, object]) -> None:
    model = context_model(**settings).eval()
    token_BT = torch.tensor([[1, 2, 3, 4, 2, 3, 3, 1, 2]])
    _, infos, _ = model(token_BT, return_routing=True)
    for info in infos:
        tile_T = info["tile_idx"].reshape(-1).tolist()
        assert tile_T[1] == tile_T[8]  # "1 2"
        assert tile_T[2] == tile_T[5]  # "2 3"


def test_a_token_changes_its_tile_with_the_one_before_it() -> None:
    model = context_model().eval()
    pair_BT = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    _, infos, _ = model(pair_BT, return_routing=True)
    for info in infos:
        tile_VV = info["tile_idx"][:, 1].reshape(V, V)
        assert (tile_VV != tile_VV[0]).any()


def test_pieces_go_to_the_tiles_of_the_whole() -> None:
    model = context_model(context_tokens=3).eval()
    token_BT = torch.randint(V, (2, 12))
    logits, infos, _ = model(token_BT, return_routing=True)
    state, parts, tiles = model.empty_state(2), [], []
    for piece in token_BT.split([5, 1, 1, 5], dim=1):
        (part, of_piece, _), state = model(piece, state=state)
        parts.append(part)
        tiles.append([info["tile_idx"] for info in of_piece])
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, atol=1e-5, rtol=1e-5)
    for layer, info in enumerate(infos):
        assert torch.equal(torch.cat([of_piece[layer] for of_piece in tiles], dim=1), info["tile_idx"])
    assert [len(part) for part in state] == [len(specs) for specs in model.state_specs()]
    with pytest.raises(ValueError, match=r"states \(0\) must be as many as blocks \(2\)"):
        model(token_BT, state=())


def test_a_step_of_training_moves_no_code_and_a_state_dict_brings_it_along() -> None:
    model = context_model(signatures="learned")
    before = model.state_dict()["context_code.table_VD"].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    logits, _, aux = model(torch.randint(V, (2, 9)), return_routing=True)
    assert aux is not None
    (logits.square().mean() + aux["total_aux"]).backward()
    optimizer.step()
    assert torch.equal(model.state_dict()["context_code.table_VD"], before)
    assert all(layer.router.raw_signatures.grad.any() for layer in routed_layers(model))
    state = model.state_dict() | {"context_code.table_VD": before.flip(0)}
    model.load_state_dict(state)
    assert model.context_code is not None
    assert torch.equal(model.context_code.table_VD, before.flip(0))


def test_a_classifier_of_ids_routes_on_context_and_its_padding_has_no_say() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(D, 1, 2, 16, ffn=FFNConfig(num_tiles=8, route_on="context"))
    model = Classifier(None, 3, config, vocab_size=V).eval()
    token_BT = torch.tensor([[1, 2, 3, 4]])
    _, (info,), _ = model(token_BT, return_routing=True)
    _, (padded,), _ = model(torch.tensor([[0, 0, 1, 2, 3, 4]]), return_routing=True)
    assert torch.equal(padded["tile_idx"][:, 2:], info["tile_idx"])


def test_a_block_that_routes_on_context_needs_codes() -> None:
    block = TriXBlock(D, 2, num_tiles=4, route_on="context")
    with pytest.raises(ValueError, match=r"route_on \('context'\) needs a code of each token"):
        block(torch.randn(1, 3, D))


def test_settings_of_codes_are_refused_where_nothing_reads_codes() -> None:
    with pytest.raises(ValueError, match=r"context_tokens \(3\) must be 2 where route_on is 'embedding'"):
        FFNConfig(context_tokens=3).build(8)


def test_signatures_as_drawn_are_frozen_and_say_so() -> None:
    model = context_model(signatures="drawn")
    drawn = context_model(signatures="learned")
    for layer, free in zip(routed_layers(model), routed_layers(drawn), strict=True):
        assert layer.router.frozen_tiles().all()
        assert torch.equal(layer.get_tile_signatures(), free.get_tile_signatures())
        assert "frozen" in layer.router.describe()
        assert "learned" in free.router.describe()
        (entry,) = layer.get_surgery_history()
        assert (entry["operation"], entry["tile_idx"], entry["tag"]) == ("freeze", -1, "as drawn")
    with pytest.raises(ValueError, match=r"signatures \('drawn'\) needs routing 'explicit' or 'emergent', got 'learned'"):
        context_model(signatures="drawn", routing="learned")
    with pytest.raises(ValueError, match=r"signatures \('kept'\) must be 'learned', 'drawn' or None"):
        context_model(signatures="kept")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_neither_round_ids_nor_codes(dtype: torch.dtype) -> None:
    code = ContextCode(5000, D, 3)
    token_BT = torch.randint(5000, (2, 20))
    whole_BTD, _ = code(token_BT)
    code.to(dtype)
    assert code.table_VD.dtype == torch.promote_types(dtype, torch.float32)
    state, parts = code.empty_state(2), []
    for piece_BT in token_BT.split(1, dim=1):
        part_BTD, state = code(piece_BT, state=state)
        parts.append(part_BTD)
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole_BTD)


@pytest.mark.parametrize("ffn", [{"routing": "hash"}, {"kind": "dense"}, {"kind": "none"}], ids=["hash", "dense", "none"])
def test_no_codes_are_made_where_nothing_reads_them(ffn: dict[str, Any]) -> None:
    assert context_model(**ffn).context_code is None


def test_a_language_model_routes_on_context_by_signatures_as_drawn_unless_told_otherwise() -> None:
    model = LanguageModel(V)
    assert model.context_code is not None
    assert model.context_code.num_tokens == 2
    layers = list(routed_layers(model))
    assert [layer.num_tiles for layer in layers] == [64] * 4
    assert all(layer.router.frozen_tiles().all() for layer in layers)


@pytest.mark.parametrize("ffn", [{"signatures": "learned"}, {"routing": "emergent"}, {"route_on": "embedding"}], ids=str)
def test_signatures_learn_where_they_are_told_to_or_read_no_codes(ffn: dict[str, Any]) -> None:
    assert not any(layer.router.frozen_tiles().any() for layer in routed_layers(context_model(**ffn)))
