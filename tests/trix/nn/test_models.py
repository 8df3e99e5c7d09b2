import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import assert_pieces_are_the_whole

from trix import TriXBlock, TriXStack
from trix.nn import (
    Classifier,
    ClassifierConfig,
    FFNConfig,
    LanguageModel,
    LanguageModelConfig,
    SparseLookupFFN,
    TriXFFN,
    pack_model,
    routed_layers,
    unpack_model,
)
from trix.nn.classifier import WindowEmbedding
from trix.outputs import TokenContext

SMALL = LanguageModelConfig(d_model=16, num_layers=2, n_heads=2, context_length=12, ffn=FFNConfig(num_tiles=4))
KINDS = [
    FFNConfig(num_tiles=4),
    FFNConfig(num_tiles=4, top_k=2, routing="emergent"),
    FFNConfig(num_tiles=4, routing="learned"),
    FFNConfig(num_tiles=4, route_on="embedding"),
    FFNConfig(kind="dense"),
    FFNConfig(kind="none"),
]


def small_model(ffn: FFNConfig = SMALL.ffn, ternary_attention: bool = False) -> LanguageModel:
    return LanguageModel(11, LanguageModelConfig(16, 2, 2, 12, ternary_attention, 0.0, ffn))


@pytest.mark.parametrize("ffn", KINDS, ids=lambda ffn: f"{ffn.kind}-{ffn.routing}-{ffn.route_on}")
def test_language_model_is_causal_and_reports_its_routed_layers(ffn: FFNConfig) -> None:
    model = small_model(ffn).double().eval()
    token = torch.randint(0, 11, (3, 12))
    logits, infos, aux = model(token, return_routing=True)
    assert logits.shape == (3, 12, 11)
    assert len(infos) == (2 if ffn.kind == "trix" else 0)
    assert (aux is None) == (ffn.kind != "trix")
    edited = token.clone()
    edited[:, 7:] = (edited[:, 7:] + 1) % 11
    torch.testing.assert_close(model(edited)[:, :7], logits[:, :7])


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.booleans())
def test_read_in_any_pieces_a_text_is_answered_as_a_whole(data: st.DataObject, ffn: FFNConfig, is_packed: bool) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = small_model(ffn, ternary_attention=True).double().eval()
    model = pack_model(model) if is_packed else model
    token = torch.randint(0, 11, (2, 12))
    state = assert_pieces_are_the_whole(model, token, data.draw(st.sets(st.integers(0, 12))))
    with pytest.raises(ValueError, match=r"sequence length \(1 after 12 before\) must be <= context_length \(12\)"):
        model(token[:, :1], state=state)


def test_aux_losses_of_the_layers_add_up_and_vanish_in_evaluation() -> None:
    model = small_model(FFNConfig(num_tiles=4, balance_weight=0.5, balance_rate=0.0))
    token = torch.randint(0, 11, (3, 12))
    _, _, aux = model.train()(token, return_routing=True)
    x, total = model.embedding(token), 0.0
    embedding = x
    for block in model.stack.blocks:
        x, _, layer_aux = block(x, return_routing=True, context=TokenContext(embedding_BTD=embedding))
        total += layer_aux["balance"].item()
    assert aux["total_aux"].item() == pytest.approx(total)
    assert aux["balance"].item() >= 2 * 0.5 * 0.9  # each layer's balance loss is about 1 or more
    _, _, aux = model.eval()(token, return_routing=True)
    assert aux["total_aux"].item() == 0.0


def test_model_learns_a_periodic_text() -> None:
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    token = (torch.arange(13) % 5).repeat(8, 1) + torch.arange(8)[:, None] % 3
    for _ in range(120):
        logits, _, aux = model(token[:, :-1], return_routing=True)
        loss = F.cross_entropy(logits.flatten(0, 1), token[:, 1:].flatten()) + aux["total_aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(model(token[:, :-1]).flatten(0, 1), token[:, 1:].flatten()).item() < 0.5


@pytest.mark.parametrize("ffn", KINDS, ids=lambda ffn: f"{ffn.kind}-{ffn.routing}-{ffn.route_on}")
def test_packing_a_model_keeps_it_and_unpacks(ffn: FFNConfig) -> None:
    model = small_model(ffn, ternary_attention=True).eval()
    token = torch.randint(0, 11, (2, 9))
    before = model(token)
    packed = pack_model(copy.deepcopy(model))
    torch.testing.assert_close(packed(token), before)
    loaded = small_model(ffn, ternary_attention=True).eval()
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(loaded(token), packed(token))
    torch.testing.assert_close(unpack_model(packed)(token), before)


def test_state_dict_round_trip_includes_the_balance_bias() -> None:
    model = small_model().train()
    model(torch.randint(0, 11, (4, 12)))
    other = small_model()
    other.load_state_dict(model.state_dict())
    token = torch.randint(0, 11, (2, 12))
    assert torch.equal(other.eval()(token), model.eval()(token))
    assert any(block.ffn.router.balance_bias.abs().sum() > 0 for block in other.stack.blocks)


def test_language_model_exports_and_compiles() -> None:
    model = small_model().eval()
    token = torch.randint(0, 11, (2, 8))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=12)}
    program = torch.export.export(model, (token,), dynamic_shapes=(dims,))
    other = torch.randint(0, 11, (5, 3))
    torch.testing.assert_close(program.module()(other), model(other))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token), model(token))


def test_classifier_looks_both_ways_and_trains() -> None:
    torch.manual_seed(0)
    model = Classifier(6, 3, ClassifierConfig(d_model=16, n_heads=2, context_length=5, ffn=FFNConfig(num_tiles=4)))
    x, y = torch.randn(30, 5, 6), torch.arange(30) % 3
    x[torch.arange(30), y] += 3.0  # the class is the position of the large row
    logits, infos, _ = model(x, return_routing=True)
    assert logits.shape == (30, 3)
    assert infos[0]["tile_idx"].shape == (30, 5, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(x).argmax(-1).eq(y).float().mean() > 0.9


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["explicit", "learned", "hash"]), st.integers(0, 99)
)
def test_padding_changes_nothing(lengths: list[int], routing: str, seed: int) -> None:
    """Each row of a padded batch is answered as it is alone, without padding."""
    torch.manual_seed(seed)
    config = ClassifierConfig(16, n_heads=2, context_length=9, window=3, ffn=FFNConfig(num_tiles=4, routing=routing))
    model = Classifier(None, 3, config, vocab_size=11).eval()
    token_BT = torch.randint(1, 11, (len(lengths), 9)) * (torch.arange(9) < torch.tensor(lengths)[:, None])
    logits, infos, _ = model(token_BT, return_routing=True)
    for row, length in enumerate(lengths):
        alone, alone_infos, _ = model(token_BT[row : row + 1, :length], return_routing=True)
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-5)
        for info, alone_info in zip(infos, alone_infos, strict=True):
            assert torch.equal(info["tile_idx"][row, :length], alone_info["tile_idx"][0])


def test_a_row_of_padding_alone_is_finite() -> None:
    model = Classifier(None, 3, ClassifierConfig(16, n_heads=2, ffn=FFNConfig(num_tiles=4)), vocab_size=11)
    assert model(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


def test_window_embedding_is_the_sum_over_its_neighbours() -> None:
    torch.manual_seed(0)
    embedding = WindowEmbedding(7, 4, window=3).double()
    token = torch.tensor([[3, 1, 4, 0]])
    e = embedding.weight[token[0]]
    assert not e[3].any()
    left, centre, right = embedding.mix.weight.unbind(dim=-1)
    want = [e[t] + centre @ e[t] + (left @ e[t - 1] if t else 0) + right @ e[t + 1] for t in range(3)]
    torch.testing.assert_close(embedding(token)[0, :3], torch.stack(want))
    with pytest.raises(ValueError, match=r"window \(4\) must be odd and >= 1"):
        WindowEmbedding(7, 4, window=4)


def test_block_and_stack_agree_with_their_parts() -> None:
    stack = TriXStack(num_layers=2, d_model=16, n_heads=2, ffn=FFNConfig(num_tiles=4), context_length=8).eval()
    x = torch.randn(2, 8, 16)
    y = x
    for block in stack.blocks:
        y = block(y, context=TokenContext(embedding_BTD=x))
    assert torch.equal(stack(x), y)
    block = TriXBlock(16, 2, FFNConfig(num_tiles=4), context_length=8).eval()
    h = x + block.mixer.inner(block.mixer.norm(x))[0]
    torch.testing.assert_close(block(x), h + block.ffn(block.feed_forward.norm(h), routing_x=block.routing_norm(x)))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(0\) must be >= 1"):
        LanguageModel(0)
    with pytest.raises(ValueError, match=r"dropout \(1.5\) must be >= 0 and <= 1"):
        TriXBlock(16, 2, dropout=1.5)
    with pytest.raises(ValueError, match=r"dropout \(-0.5\) must be >= 0 and <= 1"):
        SparseLookupFFN(16, 4, dropout=-0.5)
    with pytest.raises(ValueError, match=r"num_layers \(0\) must be >= 1"):
        TriXStack(num_layers=0)
    with pytest.raises(ValueError, match=r"num_features \(0\) must be >= 1"):
        Classifier(0, 3)
    for sizes in ({"num_features": None}, {"num_features": 4, "vocab_size": 5}):
        with pytest.raises(ValueError, match=r"exactly one of num_features \(.+\) and vocab_size \(.+\) must be given"):
            Classifier(num_classes=3, **sizes)
    with pytest.raises(ValueError, match=r"states \(1\) must be as many as blocks \(2\)"):
        small_model()(torch.zeros(1, 3, dtype=torch.int64), state=small_model().empty_state(1)[:1])
    with pytest.raises(ValueError, match=r"sequence length \(13\) must be <= context_length \(12\)"):
        small_model()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    "kind", [{"routing": "explicit"}, {"routing": "emergent"}, {"routing": "learned"}, {"kind": "sparse_lookup_v2", "top_k": 2}]
)
def test_routed_on_its_embedding_a_token_goes_to_the_same_tiles_in_every_context(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    token = torch.arange(5).repeat(2)[None, torch.randperm(10)]
    for route_on, is_steady in (("embedding", True), ("hidden", False)):
        model = small_model(FFNConfig(num_tiles=8, route_on=route_on, **kind)).eval()
        _, infos, _ = model(token, return_routing=True)
        tiles = [{tuple(chosen) for chosen in info["tile_idx"][token == t].tolist()} for info in infos for t in range(5)]
        assert all(len(choices) == 1 for choices in tiles) == is_steady


def test_routing_on_the_embedding_trains_embedding_and_signatures() -> None:
    model = small_model(FFNConfig(num_tiles=4, route_on="embedding", balance_weight=0.0))
    logits, infos, _ = model(torch.randint(0, 11, (2, 12)), return_routing=True)
    torch.autograd.grad(infos[1]["weight"].sum(), [model.embedding.weight], retain_graph=True)
    logits.logsumexp(-1).sum().backward()
    for ffn in routed_layers(model):
        assert ffn.router.raw_signatures.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["trix", "sparse_lookup", "sparse_lookup_v2"])
@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 0, 16)])
def test_an_empty_batch_goes_through_a_block(kind: Any, shape: tuple[int, ...]) -> None:
    block = TriXBlock(16, 2, FFNConfig(kind=kind, num_tiles=4, top_k=2), context_length=8)
    y, info, _ = block(torch.randn(shape), return_routing=True)
    assert y.shape == shape
    assert info["tile_idx"].shape == info["weight"].shape == (*shape[:-1], 2)


def test_what_routing_reads_must_fit() -> None:
    with pytest.raises(ValueError, match=r"routing_x \(3, 8\) must have the shape of x \(2, 8\)"):
        TriXFFN(8, 2)(torch.randn(2, 8), routing_x=torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"route_on \('both'\) must be 'embedding', 'hidden' or 'context'"):
        FFNConfig(route_on="both").build(8)  # type: ignore[arg-type]
