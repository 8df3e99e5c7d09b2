"""Blocks of parts that the packages do not know: a mixer with a state of its own, a router that reads it, tiles."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import assert_pieces_are_the_whole
from torch import Tensor, nn

from trix.introspection import TriXIntrospector, html_report
from trix.nn import (
    Classifier,
    ClassifierConfig,
    FFNConfig,
    HierarchicalTriXFFN,
    LanguageModel,
    LanguageModelConfig,
    Mixer,
    RotaryAttention,
    SparseLookupFFNv2,
    TernaryWeight,
    Tiles,
    TriXBlock,
    TriXFFN,
    TriXLinear,
    TriXStack,
    pack_model,
    routed_layers,
    unpack_model,
)
from trix.outputs import Directions, RoutingDecision, RowContext, State, StateSpec, TokenContext
from trix.routing import Router
from trix.routing.calibration import ScoreCalibrationSpline


class DecayMixer(Mixer):
    """sum[t] = decay * sum[t - 1] + W x[t]; the phase is the first entry of the sum."""

    is_causal_only = True
    gives = frozenset({"phase"})

    def __init__(self, d_model: int, *, decay: float = 0.5, **_: Any) -> None:
        super().__init__()
        self.d_model, self.decay = d_model, decay
        self.value = nn.Linear(d_model, d_model, bias=False)

    def state_specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec("sum", ("batch", self.d_model)),)

    def forward(self, x_BTD: Tensor, context: TokenContext, state: State | None = None) -> tuple[Tensor, State, Tensor]:
        total = torch.zeros_like(x_BTD[:, 0]) if state is None else state[0]
        sums = []
        for value_BD in self.value(x_BTD).unbind(1):
            total = self.decay * total + value_BD
            sums.append(total)
        y_BTD = torch.stack(sums, dim=1) if sums else torch.zeros_like(x_BTD)
        return y_BTD, () if state is None else (total,), y_BTD[..., 0]


class PhaseRouter(Router):
    """score[t, e] = -|phase[t] - e / E|."""

    reads = frozenset({"phase"})

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        assert context.phase_T is not None
        edge_E = torch.arange(self.num_tiles, device=x_TD.device) / self.num_tiles
        return self._decide(-(context.phase_T.unsqueeze(-1) - edge_E).abs())


class LinearTiles(Tiles):
    """tile_e(x) = scale * W_e x."""

    def __init__(self, d_model: int, num_tiles: int, tile_width: int, *, scale: float = 1.0) -> None:
        super().__init__(d_model, num_tiles, tile_width)
        self.scale, self.matrix = scale, TernaryWeight(num_tiles, d_model, d_model)

    def forward(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor, skip_unused: bool = False) -> Tensor:
        y = [
            weight_T.unsqueeze(-1) * self.matrix.of_tiles(x_TD, idx_T)
            for weight_T, idx_T in zip(weight_TK.T, tile_idx_TK.T, strict=True)
        ]
        return self.scale * sum(y, torch.zeros_like(x_TD))


def path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


OWN = FFNConfig(num_tiles=4, routing=path(PhaseRouter), tiles=path(LinearTiles), tiles_args={"scale": 0.5})


def own_model(**changes: Any) -> LanguageModel:
    arguments: dict[str, Any] = {"mixer": path(DecayMixer), "mixer_args": {"decay": 0.25}, "ffn": OWN}
    return LanguageModel(11, LanguageModelConfig(16, 3, 2, 12, **(arguments | changes)))


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from([(), (1,), (0, 2)]), st.booleans())
def test_a_stack_of_own_and_known_parts_reads_texts_in_any_pieces(
    data: st.DataObject, attention_at: tuple[int, ...], is_packed: bool
) -> None:
    torch.manual_seed(0)
    ffn = FFNConfig(num_tiles=4, tiles=path(LinearTiles)) if attention_at else OWN
    model = own_model(attention_at=attention_at, ffn=ffn).double().eval()
    kinds = [type(mixer) for mixer in model.stack.mixers]
    assert kinds == [RotaryAttention if index in attention_at else DecayMixer for index in range(3)]
    model = pack_model(model) if is_packed else model
    token = torch.randint(0, 11, (2, 12))
    assert_pieces_are_the_whole(model, token, data.draw(st.sets(st.integers(0, 12))))


def test_own_tiles_train_pack_and_load() -> None:
    torch.manual_seed(0)
    model = own_model()
    token = torch.randint(0, 11, (2, 12))
    logits, infos, aux = model(token, return_routing=True)
    assert len(infos) == 3
    assert aux is not None
    (logits.logsumexp(-1).mean() + aux["total_aux"]).backward()
    for layer in routed_layers(model):
        assert layer.tiles.matrix.weight.grad.abs().sum() > 0
    model.eval()
    before = model(token)
    packed = pack_model(copy.deepcopy(model))
    torch.testing.assert_close(packed(token), before)
    other = own_model().eval()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(token), packed(token))
    torch.testing.assert_close(unpack_model(packed)(token), before)


def test_own_tiles_compute_what_a_loop_does() -> None:
    tiles = LinearTiles(8, 3, 8, scale=0.5).double()
    x, tile_idx, weight = torch.randn(5, 8).double(), torch.randint(0, 3, (5, 2)), torch.rand(5, 2).double()
    expected = torch.zeros_like(x)
    for t, k in itertools.product(range(5), range(2)):
        expected[t] += 0.5 * weight[t, k] * (tiles.matrix.ternary()[tile_idx[t, k]] @ x[t])
    torch.testing.assert_close(tiles(x, tile_idx, weight), expected)
    tiles.pack()
    torch.testing.assert_close(tiles(x, tile_idx, weight), expected)


def test_a_report_and_introspection_take_a_router_they_do_not_know() -> None:
    model = own_model().eval()
    token = torch.randint(0, 11, (2, 12))
    page = html_report(model, token, [["a"] * 12] * 2)
    assert "PhaseRouter chooses the tiles." in page
    introspector = TriXIntrospector(model)
    assert math.isfinite(introspector.routing_entropy(token))
    assert math.isnan(introspector.routing_stability(token))
    with pytest.raises(ValueError, match=r"layer \(0\) is routed by a PhaseRouter, which has no directions"):
        introspector.why(token)


class ColumnRouter(Router):
    """The tile of the greatest of the first E entries."""

    def forward(self, x_TD: Tensor, context: RowContext = RowContext(), emergent_ED: Tensor | None = None) -> RoutingDecision:
        return self._decide(x_TD[:, : self.num_tiles])

    def explain(self, emergent_ED: Tensor | None = None) -> Directions:
        return Directions(torch.eye(self.num_tiles, self.d_model), self.balance_bias)


def test_a_router_that_explains_itself_is_explained() -> None:
    ffn = TriXFFN(8, 4, routing=path(ColumnRouter)).eval()
    x = torch.randn(6, 8)
    for found, row in zip(TriXIntrospector(ffn).why(x, num_dims=2), x, strict=True):
        assert found.tile_idx == int(row[:4].argmax())
        assert found.decisive_dims[0] in (found.tile_idx, found.runner_up_idx)


def test_what_a_router_reads_must_be_given_when_the_block_is_made() -> None:
    ffn = FFNConfig(num_tiles=4, routing=path(PhaseRouter))
    with pytest.raises(ValueError, match=r"what router PhaseRouter reads \(phase\) must be given by the mixer, which"):
        TriXBlock(16, 2, ffn)
    with pytest.raises(ValueError, match=r"routing \('hash'\) needs the id of each token, and tokens are vectors here"):
        Classifier(4, 2, ClassifierConfig(ffn=FFNConfig(num_tiles=2, routing="hash")))


def test_a_mixer_that_cannot_look_ahead_refuses_to() -> None:
    model = Classifier(4, 2, ClassifierConfig(16, 1, 2, mixer=path(DecayMixer)))
    with pytest.raises(ValueError, match=r"is_causal \(False\) must be True with mixer DecayMixer"):
        model(torch.randn(2, 3, 4))


def test_names_of_parts_and_places_of_attention_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mixer \('atention'\) must be 'attention', 'resolvent', 'ssd', or the import path"):
        TriXBlock(16, 2, mixer="atention")
    kinds = "'explicit', 'emergent', 'learned', 'hash', 'scattering'"
    with pytest.raises(ValueError, match=rf"routing \('sideways'\) must be {kinds}, or the"):
        TriXFFN(8, 2, routing="sideways")
    with pytest.raises(ValueError, match=r"tiles \('torch.nn.Linear'\) must derive from trix.nn.tiles.Tiles"):
        TriXFFN(8, 2, tiles="torch.nn.Linear")
    with pytest.raises(ValueError, match=r"attention_at \(\[3\]\) must be >= 0 and < num_layers \(3\)"):
        own_model(attention_at=(3,))
    with pytest.raises(ValueError, match=r"settings of ffn \(num_tiles\) must stand in ffn, which is given"):
        TriXBlock(16, 2, FFNConfig(), num_tiles=4)


def test_short_ways_to_say_it() -> None:
    block = TriXBlock(16, 2, num_tiles=8, top_k=2)
    assert (block.ffn.num_tiles, block.ffn.router.top_k) == (8, 2)
    stack = TriXStack(n_layers=3, d_model=16, n_heads=2, num_tiles=4)
    assert [block.ffn.num_tiles for block in stack.blocks] == [4, 4, 4]
    x = torch.randn(2, 5, 16)
    assert stack(x).shape == block(x).shape == x.shape
    adaptive = TriXFFN(16, 4, adaptive_k=True)
    assert adaptive.router.is_adaptive
    assert adaptive.router.top_k == 2
    assert TriXFFN(16, 1, adaptive_k=True).router.top_k == 1
    assert TriXFFN(16, 4, adaptive_k=True, max_k=3).router.top_k == 3


def test_names_that_users_of_the_interface_rely_on() -> None:
    torch.manual_seed(0)
    ffn = SparseLookupFFNv2(16, 4, num_classes=3)
    assert ffn.signatures.shape == (4, 16)
    assert set(ffn.signatures.unique().tolist()) <= {-1.0, 0.0, 1.0}
    ffn.signatures.sum().backward()
    assert ffn.signatures_raw.grad is not None
    with torch.no_grad():
        ffn.signatures_raw[1] = 1.0
    assert ffn.signatures[1].eq(1).all()
    assert isinstance(ffn.signatures_raw, nn.Parameter)
    ffn(torch.randn(5, 16), labels=torch.tensor([0, 1, 2, 0, 1]))
    assert ffn.claim_matrix.shape == (4, 3)
    assert int(ffn.claim_matrix.sum()) == int(ffn.total_count) == 5
    assert ScoreCalibrationSpline(5).knot_values.tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    linear = TriXLinear(8, 8, num_tiles=2)
    assert torch.equal(linear.cached_signatures, linear.get_tile_signatures())


def test_the_context_says_whether_it_is_causal_unless_the_argument_does() -> None:
    block = TriXBlock(16, 2, num_tiles=4).eval()
    x = torch.randn(1, 5, 16)
    both_ways = TokenContext(is_causal=False)
    assert torch.equal(block(x, context=both_ways), block(x, is_causal=False))
    assert torch.equal(block(x, is_causal=True, context=both_ways), block(x))
    assert not torch.equal(block(x, context=both_ways), block(x))


class SharedTiles(LinearTiles):
    """Tiles with a weight that they share, whose first axis happens to be the number of tiles."""

    def __init__(self, d_model: int, num_tiles: int, tile_width: int) -> None:
        super().__init__(d_model, num_tiles, tile_width)
        self.shared = nn.Parameter(torch.zeros(num_tiles, num_tiles))


def test_a_shared_weight_belongs_to_no_tile() -> None:
    ffn = TriXFFN(8, 4, routing="explicit", tiles=path(SharedTiles))
    assert [tuple(value.shape) for value in ffn.tiles.tile_parameters()] == [(4, 8, 8)]


def test_settings_that_a_layer_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="max_k"):
        HierarchicalTriXFFN(16, 8, max_k=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="unexpected keyword argument 'sede'"):
        TriXFFN(8, 4, routing="hash", routing_args={"sede": 3})
    with pytest.raises(ValueError, match=r"num_layers \(2\) and n_layers \(3\) are two names of one number"):
        TriXStack(2, n_layers=3)


def test_hierarchical_layers_take_tiles_of_ones_own() -> None:
    config = FFNConfig("hierarchical", num_tiles=4, tiles=path(LinearTiles), tiles_args={"scale": 2.0})
    ffn = config.build(8)
    assert isinstance(ffn, HierarchicalTriXFFN)
    assert isinstance(ffn.tiles, LinearTiles)
    assert ffn(torch.randn(3, 8)).shape == (3, 8)


class VotelessTiles(Tiles):
    def forward(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor, skip_unused: bool = False) -> Tensor:
        return x_TD


def test_tiles_without_votes_say_what_is_missing() -> None:
    ffn = TriXFFN(8, 2, routing="explicit", tiles=path(VotelessTiles))
    assert torch.equal(ffn(torch.ones(1, 8)), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"VotelessTiles holds no TernaryWeight, so it must have votes\(\) of its own"):
        TriXFFN(8, 2, routing="emergent", tiles=path(VotelessTiles))(torch.ones(1, 8))
