"""Activation checkpointing: the gradient of the layer's own output, each batch counted once, nothing moved before its time."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from trix.nn import GatedFFN, HashFFN, HierarchicalTriXFFN, SparseLookupFFN, SparseLookupFFNv2, TriXFFN
from trix.routing import ScatteringRouter, SignatureSurgery

WIDTH, NUM_TILES, NUM_TOKENS = 16, 8, 32
LAYERS: dict[str, Callable[[], SignatureSurgery]] = {
    "trix explicit": lambda: TriXFFN(WIDTH, NUM_TILES, top_k=2, routing="explicit", balance_rate=0.2),
    "trix emergent": lambda: TriXFFN(WIDTH, NUM_TILES, balance_rate=0.2),
    "hierarchical": lambda: HierarchicalTriXFFN(WIDTH, NUM_TILES, balance_rate=0.2),
    "gated": lambda: GatedFFN(WIDTH, NUM_TILES, balance_rate=0.2),
    "hash": lambda: HashFFN(WIDTH, NUM_TILES),
    "scattering": lambda: TriXFFN(WIDTH, NUM_TILES, top_k=2, routing="scattering", routing_args={"edge_rate": 0.5}),
    "lookup": lambda: SparseLookupFFN(WIDTH, NUM_TILES, dropout=0.0, balance_rate=0.2),
    "lookup v2": lambda: SparseLookupFFNv2(WIDTH, NUM_TILES, dropout=0.0, balance_rate=0.2),
}


class Whole(nn.Module):
    """A layer as a map from x to its output, with all that it takes."""

    def __init__(self, layer: SignatureSurgery) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(len(x))
        if isinstance(self.layer, SparseLookupFFN):
            return self.layer(x, labels=tokens % 3)[0]
        return self.layer(x, token_idx=tokens, phase=1.5 + x[:, 0].tanh())


def moving(whole: Whole) -> Tensor:
    """What the batches move in the router."""
    router = whole.layer.router
    return router.edge if isinstance(router, ScatteringRouter) else router.balance_bias


def reentrant(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(run, x, use_reentrant=True)


def not_reentrant(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(run, x, use_reentrant=False)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": reentrant,
    "not reentrant": not_reentrant,
    "nested": lambda run, x: not_reentrant(lambda value: not_reentrant(run, value), x),
    "nested reentrant": lambda run, x: reentrant(lambda value: reentrant(run, value), x),
    "reentrant within": lambda run, x: not_reentrant(lambda value: reentrant(run, value), x),
    "wrapper": lambda run, x: checkpoint_wrapper(run, CheckpointImpl.NO_REENTRANT)(x),
    "reentrant wrapper": lambda run, x: checkpoint_wrapper(run, CheckpointImpl.REENTRANT)(x),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_way = pytest.mark.parametrize("way", WAYS)


def pair(name: str) -> tuple[Whole, Whole]:
    torch.manual_seed(0)
    plain = Whole(LAYERS[name]())
    return plain, copy.deepcopy(plain)


def state_of(whole: Whole) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in whole.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def assert_same_gradients(one: Whole, other: Whole) -> None:
    for (name, value), twin in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (value.grad is None) == (twin.grad is None), name
        if value.grad is not None:
            torch.testing.assert_close(twin.grad, value.grad, rtol=1e-5, atol=1e-7)


@every_way
@every_layer
def test_checkpointing_changes_neither_gradient_nor_state(name: str, way: str) -> None:
    plain, saved = pair(name)
    first = moving(saved).clone()
    for _ in range(4):
        x = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
        y, y_saved = plain(x), WAYS[way](saved, x)
        assert torch.equal(y, y_saved)
        for whole, output in ((plain, y), (saved, y_saved)):
            whole.zero_grad()
            output.square().mean().backward()
        assert_same_gradients(plain, saved)
        assert_equal(state_of(plain), state_of(saved))
    assert int(saved.layer.surgery_log.step) == 4
    if name not in ("hash",):
        assert not torch.equal(moving(saved), first)


@pytest.mark.parametrize("separately", [False, True])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "nested reentrant"])
@pytest.mark.parametrize("name", ["trix explicit", "lookup"])
def test_two_calls_before_their_backward_are_both_routed_by_what_was(name: str, way: str, separately: bool) -> None:
    plain, saved = pair(name)
    for _ in range(3):
        xs = [torch.randn(NUM_TOKENS, WIDTH, requires_grad=True) for _ in range(2)]
        for whole, run in ((plain, plain), (saved, lambda x: WAYS[way](saved, x))):
            whole.zero_grad()
            losses = [run(x).square().mean() for x in xs]
            for loss in losses if separately else [losses[0] + losses[1]]:
                loss.backward()
        assert_same_gradients(plain, saved)
        assert_equal(state_of(plain), state_of(saved))
    assert int(saved.layer.surgery_log.step) == 6


def test_a_second_backward_through_a_kept_graph_is_routed_by_what_was() -> None:
    plain, saved = pair("trix explicit")
    x = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    y, y_saved = plain(x), not_reentrant(saved, x)
    for output in (y, y_saved):
        output.square().mean().backward(retain_graph=True)
        output.square().mean().backward()
    assert_same_gradients(plain, saved)
    assert_equal(state_of(plain), state_of(saved))


@every_layer
def test_what_a_forward_reads_moves_after_the_backward_and_a_file_loses_no_batch(name: str) -> None:
    whole, _ = pair(name)
    before = moving(whole).clone()
    y = whole(torch.randn(NUM_TOKENS, WIDTH))
    assert torch.equal(moving(whole), before)
    between, twin = state_of(whole), copy.deepcopy(whole)
    assert torch.equal(moving(whole), before)
    y.sum().backward()
    assert_equal(between, state_of(whole))
    assert_equal(between, state_of(twin))
    assert torch.equal(between["layer.router.balance_bias"], whole.layer.router.balance_bias)


def test_forwards_without_a_backward_still_balance() -> None:
    whole, _ = pair("trix explicit")
    bias = whole.layer.router.balance_bias
    with torch.no_grad():
        whole(torch.randn(NUM_TOKENS, WIDTH))
    first = bias.clone()
    assert first.abs().max() > 0  # without a graph there is nothing to wait for
    y = whole(torch.randn(NUM_TOKENS, WIDTH))
    assert torch.equal(bias, first)
    del y  # its graph is gone: no backward can come
    whole.eval()
    assert not torch.equal(bias, first)


def test_an_evaluation_between_forward_and_backward_leaves_the_gradient_alone() -> None:
    plain, saved = pair("trix explicit")
    x, other = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True), torch.randn(NUM_TOKENS, WIDTH)
    y, y_saved = plain(x), not_reentrant(saved, x)
    for whole, output in ((plain, y), (saved, y_saved)):
        with torch.no_grad():
            whole.eval()(other)
        whole.train()
        output.square().mean().backward()
    assert_same_gradients(plain, saved)
    assert_equal(state_of(plain), state_of(saved))


def test_abandoned_forwards_take_no_memory_and_hold_nothing_up() -> None:
    whole, _ = pair("trix explicit")
    y = whole(torch.randn(NUM_TOKENS, WIDTH, requires_grad=True))
    for _ in range(20):
        reentrant(whole, torch.randn(NUM_TOKENS, WIDTH, requires_grad=True))
    pending = whole.layer.router.pending
    assert pending.num_batches == 21
    assert pending.nudge_E is not None
    assert pending.nudge_E.shape == (NUM_TILES,)
    y.sum().backward()
    assert pending.num_batches == 0
    assert int(whole.layer.surgery_log.step) == 21
