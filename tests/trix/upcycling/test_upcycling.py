"""Layers cut into tiles: the function stays, planted groups are found, and signatures send tokens to them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.functional.ternary import absmean_codes, absmean_ternary
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig, pack_model, routed_layers
from trix.upcycling import (
    best_choice,
    best_tiles,
    check_upcycling,
    coactive_groups,
    cut,
    fit_signatures,
    held_out_loss,
    prune,
    random_groups,
    upcycle,
)
from trix.upcycling.one_tile import OneTile, tile_weights
from trix.upcycling.upcycled import best_tiles_of, inputs_of

VOCABULARY, CONTEXT, WIDTH = 11, 8, 24
ONE_TILE = FFNConfig(num_tiles=1, d_ff=WIDTH, route_on="hidden")


def make_model(ffn: FFNConfig = ONE_TILE, d_model: int = 16, num_layers: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(VOCABULARY, LanguageModelConfig(d_model, num_layers, 2, CONTEXT, ffn=ffn)).eval()


def some_text(num_texts: int = 32) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_texts, CONTEXT), generator=torch.Generator().manual_seed(1))


def planted(num_groups: int = 4, size: int = 6, num_tokens: int = 1200) -> tuple[OneTile, Tensor, Tensor]:
    """A layer whose neurons fire in groups, one group a token; the tokens; and the group of each neuron, shuffled."""
    generator = torch.Generator().manual_seed(0)
    d_model = 32
    direction_ED = torch.linalg.qr(torch.randn(d_model, num_groups, generator=generator)).Q.T.sign()
    group_F = torch.arange(num_groups).repeat_interleave(size)[torch.randperm(num_groups * size, generator=generator)]
    up_FD = direction_ED[group_F] + 0.2 * torch.randn(len(group_F), d_model, generator=generator)
    down_DF = torch.randn(d_model, len(group_F), generator=generator)
    group_T = torch.randint(0, num_groups, (num_tokens,), generator=generator)
    x_TD = direction_ED[group_T] + 0.3 * torch.randn(num_tokens, d_model, generator=generator)
    return OneTile(up_FD, down_DF), x_TD, group_F


def as_sets(groups_EH: Tensor) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups_EH.tolist()}


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["trix", "dense"]),
    num_tiles=st.integers(1, 4),
    size=st.integers(1, 5),
    d_model=st.sampled_from([4, 12, 20]),
    seed=st.integers(0, 1000),
)
def test_all_tiles_together_are_the_ternary_layer_also_packed(
    kind: str, num_tiles: int, size: int, d_model: int, seed: int
) -> None:
    width = num_tiles * size
    tiles = FFNConfig(num_tiles=1, d_ff=width, route_on="hidden")
    model = make_model(tiles if kind == "trix" else FFNConfig("dense", d_ff=width), d_model, num_layers=1)
    made = cut(model, [random_groups(width, num_tiles, seed)], top_k=num_tiles)
    if kind == "dense":
        ffn = model.stack.blocks[0].ffn
        for linear in (ffn.up, ffn.down):
            linear.weight.data = absmean_ternary(linear.weight.data)
    token_BT = some_text(3)
    expected = model(token_BT).detach()
    for _ in range(2):
        torch.testing.assert_close(made(token_BT), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        pack_model(made)


def test_the_tiles_have_the_codes_and_scales_of_the_layer() -> None:
    layer, _, _ = planted()
    codes_DF, scale_D = absmean_codes(layer.down_DF)
    groups_EH = random_groups(24, 6)
    up_EHD, down_EDH = tile_weights(layer, groups_EH)
    assert torch.equal(up_EHD, layer.up_FD[groups_EH])
    found_codes, found_scale = absmean_codes(down_EDH)
    for tile, group in enumerate(groups_EH):
        assert torch.equal(found_codes[tile], codes_DF[:, group])
        is_any = codes_DF[:, group].ne(0).any(dim=1)
        torch.testing.assert_close(found_scale[tile][is_any], scale_D[is_any], rtol=1e-6, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 100))
def test_groups_are_of_equal_size_hold_each_neuron_once_and_do_not_change(num_tiles: int, size: int, seed: int) -> None:
    hidden_TF = torch.rand(30, num_tiles * size, generator=torch.Generator().manual_seed(seed))
    for groups_EH, again_EH in (
        [coactive_groups(hidden_TF, num_tiles, seed) for _ in range(2)],
        [random_groups(num_tiles * size, num_tiles, seed) for _ in range(2)],
    ):
        assert groups_EH.shape == (num_tiles, size)
        assert groups_EH.flatten().sort().values.tolist() == list(range(num_tiles * size))
        assert torch.equal(groups_EH, groups_EH.sort(dim=1).values)
        assert torch.equal(groups_EH, again_EH)


@pytest.mark.filterwarnings("error")
def test_neurons_that_never_fire_have_a_group_too() -> None:
    hidden_TF = torch.zeros(20, 8)
    hidden_TF[:, :3] = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    assert coactive_groups(hidden_TF, 2).flatten().sort().values.tolist() == list(range(8))


def test_planted_groups_are_found_and_their_signatures_route() -> None:
    layer, x_TD, group_F = planted()
    train_TD, test_TD = x_TD.split(len(x_TD) // 2)
    groups_EH = coactive_groups(layer.hidden(train_TD), 4)
    assert as_sets(groups_EH) == {frozenset((group_F == group).nonzero().flatten().tolist()) for group in range(4)}

    def lost(groups_EH: Tensor) -> float:
        """The share of the output's square that the routed tile leaves out, of tokens that nothing was fitted to."""
        found = fit_signatures(train_TD, best_tiles_of(layer, groups_EH, train_TD, 1))
        assert set(found.signature_ED.unique().tolist()) <= {-1.0, 0.0, 1.0}
        score_TE = test_TD @ found.signature_ED.T / found.signature_ED.ne(0).sum(dim=1).clamp_min(1).sqrt() + found.bias_E
        y_TED = layer.tile_outputs(layer.hidden(test_TD), groups_EH)
        chosen_TD = y_TED[torch.arange(len(test_TD)), score_TE.argmax(dim=1)]
        return float((y_TED.sum(dim=1) - chosen_TD).square().sum() / y_TED.sum(dim=1).square().sum())

    assert lost(groups_EH) < 0.05
    assert lost(random_groups(24, 4)) > 0.3


def test_signatures_are_the_same_each_time() -> None:
    layer, x_TD, _ = planted(num_tokens=300)
    is_best_TE = best_tiles_of(layer, random_groups(24, 4), x_TD, 2)
    one, other = (fit_signatures(x_TD, is_best_TE, seed=3) for _ in range(2))
    assert torch.equal(one.signature_ED, other.signature_ED)
    assert torch.equal(one.bias_E, other.bias_E)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000), st.data())
def test_the_best_tiles_are_those_with_the_least_left_out_where_outputs_are_orthogonal(
    num_tiles: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_tiles))
    size_TE = torch.rand(9, num_tiles, generator=torch.Generator().manual_seed(seed)) + 0.01
    found_TE = best_tiles(torch.diag_embed(size_TE), top_k)
    expected_TE = torch.zeros_like(found_TE).scatter(1, size_TE.topk(top_k, dim=1).indices, True)
    assert torch.equal(found_TE, expected_TE)


def test_the_greedy_choice_is_not_always_the_best() -> None:
    """Two tiles that cancel are kept, although leaving out both would lose nothing."""
    large = torch.tensor([5.0, 0.0])
    y_TED = torch.stack([large, -large, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])])[None]
    assert best_tiles(y_TED, 2).tolist() == [[True, True, False, False]]
    left_out = {
        chosen: float(y_TED[0, [tile for tile in range(4) if tile not in chosen]].sum(dim=0).norm())
        for chosen in itertools.combinations(range(4), 2)
    }
    assert left_out[2, 3] == min(left_out.values())


@pytest.mark.parametrize("freeze", [True, False])
def test_an_upcycled_model_says_what_was_done_and_all_else_is_as_it_was(freeze: bool) -> None:
    model = make_model()
    model.stack.blocks[0].ffn.insert_signature(0, torch.ones(16), tag="before")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made, groups = upcycle(model, some_text(), 6, 2, freeze=freeze)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    kept = [name for name in state if ".feed_forward.inner." not in name]
    assert all(torch.equal(made.state_dict()[name], state[name]) for name in kept)
    assert len(kept) == len([name for name in made.state_dict() if ".feed_forward.inner." not in name])
    assert [groups_EH.shape for groups_EH in groups] == [(6, 4)] * 2
    first, second = routed_layers(made)
    assert [entry["operation"] for entry in first.get_surgery_history()] == ["insert", "upcycle"]
    (entry,) = second.get_surgery_history()
    assert entry == {
        "operation": "upcycle",
        "tile_idx": -1,
        "step": 0,
        "tag": "",
        "grouping": "coactive",
        "top_k": 2,
        "num_tokens": 32 * CONTEXT,
        "seed": 0,
        "frozen": freeze,
    }
    for layer in (first, second):
        assert layer.frozen_tiles().all() == freeze
        assert layer.get_tile_signatures().abs().sum() > 0
        bias_E = layer.router.balance_bias.clone()
        layer.train()(torch.randn(4, 50, 16))  # a batch that would move a bias that is not at rest
        layer.eval()
        assert torch.equal(layer.router.balance_bias, bias_E)


def test_signatures_that_learn_get_gradient_and_frozen_ones_do_not() -> None:
    model, text = make_model(), some_text()
    for freeze in (True, False):
        made = upcycle(model, text, 6, 2, freeze=freeze).network.train()
        made(text).square().sum().backward()
        gradient = routed_layers(made)[0].router.raw_signatures.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) != freeze


def test_with_the_best_choice_of_all_tiles_nothing_is_lost_and_with_few_it_is_what_the_definition_says() -> None:
    model, text = make_model(num_layers=1), some_text()
    made, groups = upcycle(model, text, 6, 2, grouping="random")
    layers = check_upcycling(model, 6, 2)
    x_TD = inputs_of(model, text)[0]
    y_TED = layers[0].tile_outputs(layers[0].hidden(x_TD), groups[0])
    expected_TD = (y_TED * best_tiles(y_TED, 2).unsqueeze(-1)).sum(dim=1)
    ffn = routed_layers(made)[0]
    with best_choice(made, layers, groups):
        torch.testing.assert_close(ffn(x_TD), expected_TD)
    assert not torch.allclose(ffn(x_TD), expected_TD, atol=1e-4)


@pytest.mark.parametrize("by", ["magnitude", "activity"])
def test_pruning_keeps_the_neurons_that_it_says(by: str) -> None:
    model, text = make_model(num_layers=1), some_text()
    (layer,), (x_TD,) = check_upcycling(model, 1, 1), inputs_of(model, text)
    up_FD, down_DF = absmean_ternary(layer.up_FD), absmean_ternary(layer.down_DF)
    size_F = up_FD.norm(dim=1) if by == "magnitude" else (x_TD @ up_FD.T).relu().square().mean(dim=0)
    kept_F = (size_F * down_DF.norm(dim=0)).topk(10).indices
    expected_TD = (x_TD @ up_FD[kept_F].T).relu().square() @ down_DF[:, kept_F].T
    pruned = prune(model, text, 10, by)
    assert pruned.config.ffn.d_ff == 10
    torch.testing.assert_close(routed_layers(pruned)[0](x_TD), expected_TD)


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    model, token_BT, target_BT = make_model(), some_text(70), some_text(70).flip(0)
    expected = torch.nn.functional.cross_entropy(model(token_BT).flatten(0, 1), target_BT.flatten()).detach()
    assert held_out_loss(model, token_BT, target_BT) == pytest.approx(float(expected), rel=1e-5)


REFUSED = [
    (ONE_TILE, 5, 2, r"num_tiles \(5\) must divide the neurons of a layer \(24\)"),
    (ONE_TILE, 4, 5, r"top_k \(5\) must be >= 1 and <= num_tiles \(4\)"),
    (ONE_TILE, 4, 0, r"top_k \(0\) must be >= 1 and <= num_tiles \(4\)"),
    (FFNConfig(num_tiles=3, d_ff=24), 4, 2, r"num_tiles \(3\) of the layer must be 1: it is cut into tiles already"),
    (FFNConfig("none"), 4, 2, r"feed-forward layer \(NoneType\) must be dense, or a TriXFFN of one tile"),
    (FFNConfig("sparse_lookup", num_tiles=4), 4, 2, r"feed-forward layer \(SparseLookupFFN\) must be dense, or a TriXFFN"),
]


@pytest.mark.parametrize(("ffn", "num_tiles", "top_k", "message"), REFUSED)
def test_what_cannot_be_cut_is_refused(ffn: FFNConfig, num_tiles: int, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(make_model(ffn), some_text(), num_tiles, top_k)


def test_a_packed_layer_and_another_grouping_are_refused() -> None:
    with pytest.raises(ValueError, match="the layer is packed: unpack it before it is cut"):
        upcycle(pack_model(make_model()), some_text(), 4, 2)
    with pytest.raises(ValueError, match=r"grouping \('alphabetic'\) must be 'coactive' or 'random'"):
        upcycle(make_model(), some_text(), 4, 2, grouping="alphabetic")
    with pytest.raises(ValueError, match=r"num_tiles \(5\) must be >= 1 and divide the neurons of the layer \(24\)"):
        random_groups(24, 5)
