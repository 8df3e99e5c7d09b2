import math

import pytest
import torch

from trix import TriXFFN
from trix.evolution import merge_tiles, redundant_pairs
from trix.introspection import Capture, TriXIntrospector
from trix.nn import (
    Classifier,
    ClassifierConfig,
    FFNConfig,
    LanguageModel,
    LanguageModelConfig,
    SparseLookupBlock,
    SparseLookupFFN,
    SparseLookupFFNv2,
)
from trix.outputs import RoutingDecision


def model(routing: str = "explicit", num_tiles: int = 4) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(11, LanguageModelConfig(16, 2, 2, 12, ffn=FFNConfig(num_tiles=num_tiles, routing=routing, top_k=1)))


TOKENS = torch.randint(0, 11, (3, 12), generator=torch.Generator().manual_seed(1))


def test_layers_are_found_in_order_and_a_model_without_any_is_refused() -> None:
    network = model()
    introspector = TriXIntrospector(network)
    assert introspector.layers == [block.ffn for block in network.stack.blocks]
    assert torch.equal(introspector.tile_signatures(1), network.stack.blocks[1].ffn.get_tile_signatures())
    with pytest.raises(ValueError, match=r"number of routed layers in the model \(0\) must be >= 1"):
        TriXIntrospector(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layer \(2\) must be >= 0 and < number of routed layers \(2\)"):
        introspector.tile_signatures(2)


def test_structure_by_hand() -> None:
    ffn = TriXFFN(4, 3, d_ff=6, routing="explicit")
    with torch.no_grad():
        ffn.router.raw_signatures.copy_(torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [-1, 0, 0, 1]]))
        ffn.tiles.up.weight.zero_()
        ffn.tiles.up.weight[0, :, 1] = 1.0  # tile 0 reads input 1 alone
    introspector = TriXIntrospector(ffn)
    similarity = introspector.signature_similarity_matrix()
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 1, -0.5], [1, 1, -0.5], [-0.5, -0.5, 1]]))
    assert introspector.redundant_tiles(0.9) == [(0, 1, pytest.approx(1.0))]
    assert introspector.redundant_tiles(1.1) == []
    torch.testing.assert_close(introspector.consensus_features(), torch.tensor([1 / 3, 2 / 3, 0, 1 / 3]))
    assert introspector.weight_density_map().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert introspector.signature_diversity() == pytest.approx((0 + 3 / 4 + 3 / 4) / 3)
    assert 0 < introspector.sparse_ratio() < 1


def test_routing_is_what_the_model_does_and_changes_nothing() -> None:
    network = model().train()
    network.stack.blocks[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    introspector = TriXIntrospector(network)
    distribution = introspector.routing_distribution(TOKENS, layer=1)
    _, infos, _ = network.eval()(TOKENS, return_routing=True)
    network.train()
    network.stack.blocks[0].eval()
    expected = torch.bincount(infos[1]["tile_idx"].flatten(), minlength=4) / TOKENS.numel()
    torch.testing.assert_close(distribution, expected)
    assert introspector.routing_entropy(TOKENS, 1) == pytest.approx(float(torch.special.entr(expected).sum()))
    assert introspector.routing_entropy(TOKENS, 1) <= math.log(4)
    introspector.why(TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not network.stack.blocks[0].training


def test_one_run_answers_every_question() -> None:
    network = model()
    runs: list[int] = []
    network.register_forward_hook(lambda *_: runs.append(1))
    introspector = TriXIntrospector(network)
    capture = introspector.capture([TOKENS[:1], TOKENS[1:]])
    assert len(runs) == 2
    answers = [
        (
            introspector.why(capture, layer),
            introspector.routing_stability(capture, 0.1, layer),
            introspector.decision(capture, layer),
        )
        for layer in range(2)
    ]
    assert len(runs) == 2
    for layer, (why, stability, decision) in enumerate(answers):
        assert [e.tile_idx for e in why] == [e.tile_idx for e in introspector.why(TOKENS, layer)]
        assert stability == pytest.approx(introspector.routing_stability(TOKENS, 0.1, layer))
        assert torch.equal(decision.tile_idx, introspector.decision(TOKENS, layer).tile_idx)
    with pytest.raises(ValueError, match=r"number of batches \(0\) must be >= 1"):
        introspector.capture([])


def test_a_layer_that_is_not_run_is_named() -> None:
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = TriXFFN(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match=r"routed layer \(0\) of the model must take part"):
        TriXIntrospector(Idle()).routing_distribution(torch.zeros(2, 4))


def test_tiles_of_weight_0_are_not_counted() -> None:
    ffn = TriXFFN(8, 4, max_k=3, confidence_threshold=0.0).eval()  # every token is sure of its tile
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    introspector = TriXIntrospector(ffn)
    best = introspector.decision(x).tile_idx[:, 0]
    torch.testing.assert_close(introspector.routing_distribution(x), torch.bincount(best, minlength=4) / 20)


@pytest.mark.parametrize("kind", ["trix", "sparse_lookup", "sparse_lookup_v2"])
def test_padding_is_left_out(kind: str) -> None:
    torch.manual_seed(0)
    network = Classifier(None, 3, ClassifierConfig(16, 2, 2, 12, ffn=FFNConfig(kind, num_tiles=4)), vocab_size=11)
    tokens = TOKENS.clamp_min(1)
    tokens[0, 7:] = tokens[2, 3:] = 0
    is_real = (tokens != 0).flatten()
    introspector = TriXIntrospector(network)
    for layer in range(2):
        x, decision = (part[layer] for part in vars(introspector.capture([tokens])).values())
        assert torch.equal((decision.weight != 0).any(dim=-1), is_real)
        real = Capture((x[is_real],) * 2, (RoutingDecision(*(part[is_real] for part in decision)),) * 2)
        assert torch.equal(introspector.routing_distribution(tokens, layer), introspector.routing_distribution(real, layer))
        stability = introspector.routing_stability(tokens, 1.0, layer)
        assert stability == introspector.routing_stability(real, 1.0, layer)
        assert 0 < stability < 1


def test_padding_is_left_out_whichever_way_the_mask_comes() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SparseLookupBlock(8, 2, 4), TriXFFN(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.tensor([[True, True, False]])
            return self.second(self.first(x, mask=mask)[0], False, None, mask)

    capture = TriXIntrospector(Model()).capture([torch.randn(1, 3, 8)])
    assert [(decision.weight != 0).any(dim=-1).tolist() for decision in capture.decision] == [[True, True, False]] * 2


@pytest.mark.parametrize("num_tiles", [2, 3])
def test_a_free_slot_wins_nothing(num_tiles: int) -> None:
    torch.manual_seed(0)
    ffn = TriXFFN(8, num_tiles).double()
    merge_tiles(ffn, 1, 0)
    ffn.router.balance_bias[0] = 9.0  # whatever stands there
    x = torch.randn(50, 8, dtype=torch.float64)
    introspector = TriXIntrospector(ffn)
    assert introspector.free_slots().tolist() == [True] + [False] * (num_tiles - 1)
    assert introspector.routing_stability(x, 0.0) == 1.0
    for e in introspector.why(x, num_dims=8):
        assert (e.tile_idx, e.runner_up_idx) in ([(1, -1)] if num_tiles == 2 else [(1, 2), (2, 1)])
        assert all(map(math.isfinite, (e.score, e.bias, e.runner_up_bias, *e.contributions)))
        if num_tiles == 3:
            assert sum(e.contributions) + e.bias - e.runner_up_bias == pytest.approx(e.score - e.runner_up_score)
        else:
            assert (e.runner_up_score, e.contributions) == (-math.inf, [0.0] * 8)


def test_redundant_tiles_are_those_that_evolution_merges() -> None:
    torch.manual_seed(0)
    ffn = TriXFFN(24, 6, routing="explicit")
    with torch.no_grad():
        ffn.router.raw_signatures[:4] = ffn.router.raw_signatures[0].clone()
    introspector = TriXIntrospector(ffn)
    for threshold in (1.0, float(introspector.signature_similarity_matrix()[4, 5]), -1.0):
        for merge in (False, True):
            layer = TriXFFN(24, 6, routing="explicit")
            layer.load_state_dict(ffn.state_dict())
            if merge:
                merge_tiles(layer, 0, 1)
            pairs = [(i, j) for i, j, _ in TriXIntrospector(layer).redundant_tiles(threshold)]
            assert sorted(pairs) == sorted(redundant_pairs(layer, threshold))
            assert len(pairs) >= (3 if merge else 6)


@pytest.mark.parametrize("kind", [SparseLookupFFN, SparseLookupFFNv2])
def test_sparse_lookup_layers_are_read_too(kind: type[SparseLookupFFN]) -> None:
    torch.manual_seed(0)
    layer = kind(d_model=8, num_tiles=5).double()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.router.balance_bias)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    introspector = TriXIntrospector(layer)
    _, info, _ = layer.eval()(x)
    decision = introspector.decision(x)
    assert torch.equal(decision.tile_idx, info["tile_idx"].reshape(-1, 1))
    for e in introspector.why(x, num_dims=8):
        assert e.tile_idx == decision.tile_idx[e.token_idx]
        assert sum(e.contributions) + e.bias - e.runner_up_bias == pytest.approx(e.score - e.runner_up_score)
    assert introspector.routing_stability(x, 0.0) == 1.0
    assert introspector.signature_similarity_matrix().diagonal().tolist() == pytest.approx([1.0] * 5)
    for question in (introspector.sparse_ratio, introspector.weight_density_map):
        with pytest.raises(ValueError, match=rf"layer \(0\) is a {kind.__name__}, whose tiles have no ternary weight matrices"):
            question()


def test_stability_is_one_without_noise_and_falls_with_it() -> None:
    introspector = TriXIntrospector(model())
    levels = [introspector.routing_stability(TOKENS, level) for level in (0.0, 0.1, 10.0)]
    assert levels[0] == 1.0
    assert levels[0] >= levels[1] > levels[2]
    with pytest.raises(ValueError, match=r"noise_level \(-1\) must be >= 0"):
        introspector.routing_stability(TOKENS, -1)


@pytest.mark.parametrize("routing", ["explicit", "emergent", "learned"])
def test_why_accounts_for_the_whole_difference(routing: str) -> None:
    network = model(routing).double().eval()
    torch.nn.init.normal_(network.stack.blocks[1].ffn.router.balance_bias, std=0.2)
    introspector = TriXIntrospector(network)
    chosen = introspector.decision(TOKENS, 1).tile_idx[:, 0]
    explanations = introspector.why(TOKENS, layer=1, num_dims=16)  # all of the dimensions
    assert [e.tile_idx for e in explanations] == chosen.tolist()
    for e in explanations:
        gap = sum(e.contributions) + e.bias - e.runner_up_bias
        assert gap == pytest.approx(e.score - e.runner_up_score)
        assert e.score >= e.runner_up_score
        assert e.contributions == sorted(e.contributions, reverse=True)


def test_a_single_tile_has_no_runner_up() -> None:
    (explanation, *_) = TriXIntrospector(model(num_tiles=1)).why(TOKENS)
    assert (explanation.tile_idx, explanation.runner_up_idx) == (0, -1)


def test_at_least_one_dimension_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"num_dims \(0\) must be >= 1"):
        TriXIntrospector(model()).why(TOKENS, num_dims=0)


def test_a_hash_has_no_reasons_and_heeds_no_noise() -> None:
    assert TriXIntrospector(model("hash")).routing_stability(TOKENS, 10.0) == 1.0
    with pytest.raises(ValueError, match=r"layer \(0\) is routed by a HashRouter, which has no directions"):
        TriXIntrospector(model("hash")).why(TOKENS)


def test_figures_show_every_tile_and_token() -> None:
    introspector = TriXIntrospector(model())
    image = introspector.plot_signatures().axes[0].images[0]
    assert image.get_array().shape == (4, 16)
    axes = introspector.plot_routing_heatmap(TOKENS, labels=["$"] * TOKENS.numel()).axes[0]
    assert axes.images[0].get_array().shape == (4, 36)
    with pytest.raises(ValueError, match=r"number of labels \(1\) must equal the number of tokens \(36\)"):
        introspector.plot_routing_heatmap(TOKENS, labels=["a"])
