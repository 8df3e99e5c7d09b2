"""TriX models as backends: values at each site, early exit, tokens, generation."""

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import torch
from small_dumps import VOCABULARY, trix_backend
from torch import Tensor, nn

from trix.introspection.capture import capture_routing
from trix.nn import routed_layers
from trix.superposition.backends import Site, TriXBackend

TEXTS = ["hello world", "abc", "ragged texts of any length"]


def raise_if_run(*_: object, **__: object) -> None:
    raise AssertionError("this must not be computed")


def hidden_states(backend: TriXBackend, tokens: dict[str, Tensor]) -> list[Tensor]:
    states: list[Tensor] = []
    with torch.no_grad():
        backend.model(tokens["input_ids"], True, mask_BT=tokens["attention_mask"].bool(), hidden_states=states)
    return states


def test_the_hidden_state_is_that_of_a_whole_run() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(TEXTS, 40)
    for layer, expected in enumerate(hidden_states(backend, tokens)[:-1]):
        assert torch.equal(backend.forward_hidden(**tokens, layer=layer), expected)


def test_nothing_beyond_the_site_is_computed() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(TEXTS, 40)
    expected = hidden_states(backend, tokens)[1]
    for module in (backend.block(1).mixer, backend.block(2), backend.model.norm, backend.model.head):  # type: ignore[union-attr]
        module.forward = raise_if_run  # type: ignore[union-attr, method-assign, assignment]
    assert torch.equal(backend.forward_hidden(**tokens, layer=1), expected)
    with pytest.raises(AssertionError, match="must not be computed"):
        backend.model(tokens["input_ids"])


def test_the_router_is_read_before_its_tiles_are_computed() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(TEXTS, 40)
    backend.block(1).ffn.tiles.forward = raise_if_run  # type: ignore[union-attr, method-assign, assignment]
    assert len(backend.activations(**tokens, sites=[Site(1, "resid_mid"), Site(1, "router_in"), Site(1, "tile")])) == 3


@pytest.mark.parametrize("kind", ["trix", "hierarchical", "sparse_lookup"])
@pytest.mark.parametrize("route_on", ["hidden", "context"])
def test_sites_of_a_layer_with_tiles_are_what_the_layer_computes(kind: str, route_on: str) -> None:
    backend = trix_backend(kind=kind, route_on=route_on)
    tokens = backend.tokenize(["equal length", "no padding  "], 40)
    sites = [Site(1, name) for name in (*backend.sites, *backend.columns(1))]
    found = backend.activations(**tokens, sites=sites)
    x, mid, router_in, ffn_out, tile, score = (found[site] for site in sites)
    states = hidden_states(backend, tokens)
    assert torch.equal(x, states[1])
    torch.testing.assert_close(mid + ffn_out, states[2])
    with torch.no_grad():
        assert torch.equal(mid, backend.block(1).mixer(x, _context(tokens))[0])  # type: ignore[union-attr, operator]
    capture = capture_routing(backend.model, routed_layers(backend.model), [tokens["input_ids"]])
    decision = capture.decision[1]
    assert torch.equal(router_in.flatten(0, 1), capture.x_TD[1])
    assert torch.equal(tile.flatten(), decision.tile_idx[:, 0])
    assert torch.equal(score.flatten(), decision.score.gather(1, decision.tile_idx[:, :1]).squeeze(1))
    assert (tile.dtype, score.dtype) == (torch.int64, torch.float32)


def _context(tokens: dict[str, Tensor]) -> object:
    from trix.outputs import TokenContext

    return TokenContext(tokens["input_ids"])


def test_a_layer_without_tiles_has_no_columns_and_no_router() -> None:
    backend = trix_backend(kind="dense", num_tiles=16, route_on="embedding")
    tokens = backend.tokenize(TEXTS, 40)
    assert backend.columns(1) == {}
    assert backend.activations(**tokens, sites=[Site(1, "ffn_out")])[Site(1, "ffn_out")].shape == (3, 26, 32)
    with pytest.raises(ValueError, match=r"site \(router_in.1\) needs a layer with tiles, got DenseFFN"):
        backend.activations(**tokens, sites=[Site(1, "router_in")])


def test_padding_changes_no_token() -> None:
    backend = trix_backend()
    sites = [Site(2, "resid_pre"), Site(2, "tile")]
    together = backend.activations(**backend.tokenize(TEXTS, 40), sites=sites)
    for row, text in enumerate(TEXTS):
        alone = backend.activations(**backend.tokenize([text], 40), sites=sites)
        torch.testing.assert_close(together[sites[0]][row, : len(text)], alone[sites[0]][0])
        assert torch.equal(together[sites[1]][row, : len(text)], alone[sites[1]][0])


def test_no_hook_stays_whatever_happens() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(TEXTS, 40)
    backend.forward_hidden(**tokens, layer=1)
    with pytest.raises(ValueError, match="must be >= 0 and <"):
        backend.activations(torch.full((1, 2), 10**6), None, [Site(1, "tile"), Site(9, "tile")])
    with pytest.raises(IndexError):
        backend.activations(torch.full((1, 2), 10**6), None, [Site(1, "tile"), Site(1, "ffn_out")])
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in backend.model.modules()]
    assert all(not after and not before for after, before in hooks)


@pytest.mark.parametrize(
    ("site", "problem"),
    [
        (Site(3, "resid_pre"), r"layer \(3\) must be >= 0 and < number of layers \(3\)"),
        (Site(-1, "resid_pre"), r"layer \(-1\) must be >= 0"),
        (Site(0, "mlp_in"), r"site \(mlp_in.0\) must be one of resid_pre, resid_mid, router_in, ffn_out, tile, score"),
    ],
)
def test_unknown_sites_are_refused(site: Site, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        trix_backend().activations(torch.zeros(1, 3, dtype=torch.int64), None, [site])


def test_a_site_is_written_as_name_and_layer() -> None:
    assert Site.parse("resid_pre.13") == Site(13, "resid_pre")
    assert str(Site(13, "resid_pre")) == "resid_pre.13"
    for text in ("resid_pre", "resid_pre.", "../x.3", "resid_pre.-1", "13"):
        with pytest.raises(ValueError, match=r"must be NAME\.LAYER"):
            Site.parse(text)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask \(1, 2\) must have the shape of input_ids \(1, 3\)"):
        trix_backend().forward_hidden(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2), 0)


def test_tokens_are_the_places_in_the_vocabulary() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(["abcd", "z", ""], 3)
    assert tokens["input_ids"].tolist() == [[0, 1, 2], [25, 0, 0], [0, 0, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"characters of 'a1' \('1'\) must be in the model's vocabulary"):
        backend.tokenize(["a1"], 8)
    with pytest.raises(ValueError, match=r"max_len \(65\) must be >= 1 and <= context_length \(64\)"):
        backend.tokenize(["a"], 65)


def test_the_vocabulary_must_be_the_models() -> None:
    model = trix_backend().model
    with pytest.raises(ValueError, match=r"vocabulary \(26 characters, 26 distinct\) must be the 27 tokens"):
        TriXBackend(model, VOCABULARY[:-1])
    with pytest.raises(ValueError, match=r"vocabulary \(27 characters, 26 distinct\)"):
        TriXBackend(model, VOCABULARY[:-1] + "a")


def test_generation_takes_the_likeliest_token_each_time() -> None:
    backend = trix_backend()
    tokens = backend.tokenize(["abc", "xyz"], 8)
    text_BT = backend.generate(**tokens, max_new_tokens=5)
    assert text_BT.shape == (2, 8)
    with torch.no_grad():
        for length in range(3, 8):
            assert torch.equal(backend.model(text_BT[:, :length])[:, -1].argmax(-1), text_BT[:, length])
    drawn = [
        backend.generate(**tokens, max_new_tokens=30, temperature=9.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match=r"attention_mask \(0 at 2 tokens\) must be 1"):
        backend.generate(**backend.tokenize(["abc", "x"], 8))
    with pytest.raises(ValueError, match=r"temperature \(-1\) must be >= 0"):
        backend.generate(**tokens, temperature=-1)


def test_the_digest_is_that_of_the_function() -> None:
    backend = trix_backend()
    assert backend.digest() == trix_backend().digest()
    others = [trix_backend(seed=1), trix_backend(top_k=2), TriXBackend(backend.model, VOCABULARY[::-1])]
    with torch.no_grad():
        changed = trix_backend()
        changed.model.embedding.weight[0, 0] += 1
    digests = {other.digest() for other in (backend, changed, *others)}
    assert len(digests) == 5


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    backend = trix_backend()
    assert not any(module.training for module in backend.model.modules() if isinstance(module, nn.Dropout))
    assert not backend.model.training
