"""Facts move with a module from device to device; no cast rounds them, and no file brings in what cannot be."""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trix.evolution import merge_tiles
from trix.nn import HierarchicalTriXFFN, SparseLookupFFN, SparseLookupFFNv2, TriXFFN
from trix.routing import SignatureSurgery, facts

WIDTH, NUM_TILES = 64, 6
LAYERS: dict[str, Callable[[], SignatureSurgery]] = {
    "trix explicit": lambda: TriXFFN(WIDTH, NUM_TILES, routing="explicit"),
    "trix emergent": lambda: TriXFFN(WIDTH, NUM_TILES),
    "hierarchical": lambda: HierarchicalTriXFFN(WIDTH, NUM_TILES),
    "lookup": lambda: SparseLookupFFN(WIDTH, NUM_TILES),
    "lookup v2": lambda: SparseLookupFFNv2(WIDTH, NUM_TILES),
}
HISTORY = "surgery_log._extra_state"
every_layer = pytest.mark.parametrize("name", LAYERS)
CASTS: list[Callable[[SignatureSurgery], object]] = [
    lambda layer: layer.half(),
    lambda layer: layer.bfloat16(),
    lambda layer: layer.to(torch.float16),
    lambda layer: layer.double().half(),
    lambda layer: layer.type(torch.bfloat16),
]


def held(layer: SignatureSurgery) -> dict[str, Tensor]:
    """What a cast must leave as it is."""
    names = layer.router.held_values().keys() | {"balance_bias", "step", "usage_E", "count_EC", "_extra_state"}
    return {key: value.clone() for key, value in layer.state_dict().items() if key.split(".")[-1] in names}


@pytest.mark.parametrize("cast", range(len(CASTS)))
@every_layer
def test_no_cast_moves_a_frozen_signature_or_another_fact(name: str, cast: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for tile_idx in range(2, NUM_TILES):
        layer.freeze_signature(tile_idx)
    if isinstance(layer, TriXFFN):
        merge_tiles(layer, 0, 1)
    with torch.no_grad():
        layer.router.balance_bias.add_(0.001)
        layer.router.balance_bias[3] = 100.001  # where narrow floats have no step of 0.01
        layer.train()(torch.randn(9, WIDTH))
    before, signature_ED = held(layer), layer.get_tile_signatures()
    CASTS[cast](layer)
    after = held(layer)
    assert next(layer.parameters()).dtype in (torch.float16, torch.bfloat16)
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    assert torch.equal(layer.get_tile_signatures()[2:].to(signature_ED.dtype), signature_ED[2:])
    layer.eval()(torch.randn(3, WIDTH, dtype=next(layer.parameters()).dtype))


@every_layer
def test_a_file_of_before_frozen_values_were_ternary_loads(name: str) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    layer.freeze_signature(1)
    state = layer.state_dict()
    raw_D = state["router.frozen_value_ED"][1] * torch.linspace(0.31, 2.0, WIDTH) + torch.linspace(-0.01, 0.01, WIDTH)
    state["router.frozen_value_ED"] = torch.zeros(NUM_TILES, WIDTH).index_copy(0, torch.tensor([1]), raw_D.unsqueeze(0))
    other.load_state_dict(state)
    assert torch.equal(other.get_tile_signatures()[1], raw_D.sign() * (raw_D.abs() > 0.3))
    assert other.router.frozen_value_ED.dtype == torch.int8


@every_layer
def test_a_layer_made_without_memory_gets_its_facts(name: str) -> None:
    layer = LAYERS[name]()
    layer.freeze_signature(1)
    with torch.device("meta"):
        empty, assigned = LAYERS[name](), LAYERS[name]()
    assert empty.router.is_frozen_E.is_meta
    empty.to_empty(device="cpu")
    assert not empty.router.is_frozen_E.any()
    empty.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for other in (empty, assigned):
        assert other.is_frozen(1)
        assert torch.equal(other.get_tile_signatures(), layer.get_tile_signatures())
        assert other.get_surgery_history() == layer.get_surgery_history()
        other.freeze_signature(2)
    assert not layer.is_frozen(2)


@every_layer
def test_the_facts_of_the_first_process_are_those_of_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DDP does with the parameters; without it, random signatures frozen before the training would differ for good."""
    torch.manual_seed(0)
    first, other = LAYERS[name](), LAYERS[name]()
    first.freeze_signature(2)
    sent = [value for value in first.router.held_values().values() if isinstance(value, Tensor)]
    messages = iter(sent)
    monkeypatch.setattr(facts, "num_processes", lambda: 2)

    def broadcast(value: Tensor, src: int) -> None:
        assert src == 0
        value.copy_(next(messages))

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    for _ in range(2):  # the second batch sends nothing
        other.train()(torch.randn(3, WIDTH))
    assert next(messages, None) is None
    assert torch.equal(other.get_tile_signatures()[2], first.get_tile_signatures()[2])


def test_a_state_dict_is_a_copy_of_the_facts() -> None:
    layer = TriXFFN(WIDTH, NUM_TILES)
    for value in layer.state_dict().values():
        value.zero_() if value.dtype != torch.bool else value.fill_(True)
    assert not layer.router.is_free_E.any()


@pytest.mark.parametrize("part", ["router.is_frozen_E", "router.frozen_value_ED", HISTORY])
@every_layer
def test_weights_without_the_frozen_facts_are_refused_even_if_not_strict(name: str, part: str) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    state = {key: value for key, value in layer.state_dict().items() if key != part}
    with pytest.raises(RuntimeError, match=rf"must come with .*{part.split('.')[-1]}"):
        other.load_state_dict(state, strict=False)
    alone = {key: value for key, value in state.items() if not key.startswith(("router.", "surgery_log."))}
    with pytest.raises(RuntimeError, match=r"must come with .*router\.is_frozen_E, router\.frozen_value_ED"):
        other.load_state_dict(alone, strict=False)
    within = torch.nn.ModuleDict({"ffn": other})
    with pytest.raises(RuntimeError, match=rf"must come with .*ffn\.{part}"):
        within.load_state_dict({f"ffn.{key}": value for key, value in state.items()}, strict=False)


@every_layer
def test_a_file_of_other_modules_leaves_the_layer_alone(name: str) -> None:
    layer = LAYERS[name]()
    layer.freeze_signature(1)
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"head.weight": torch.ones(2)}, strict=False)
    torch.nn.ModuleDict({"ffn": layer, "head": torch.nn.Linear(2, 2)}).load_state_dict(
        {"head.bias": torch.ones(2)}, strict=False
    )
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def with_value(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[key] = change(state[key])

    return apply


def first_set_to(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


NAN = float("nan")
FORGED: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("trix explicit", "router.frozen_value_ED", first_set_to(2), r"frozen_value_ED \(2\) must be -1, 0 or 1"),
    ("trix explicit", "router.frozen_value_ED", first_set_to(-128), r"frozen_value_ED \(-128\) must be -1, 0 or 1"),
    ("trix explicit", "router.frozen_value_ED", lambda v: v.float().fill_(NAN), r"frozen_value_ED \(nan\) must be finite"),
    ("trix explicit", "router.is_frozen_E", lambda v: v.float(), r"is_frozen_E \(torch.float32\) must have dtype torch.bool"),
    ("trix explicit", "router.is_frozen_E", lambda v: v.long(), r"is_frozen_E \(torch.int64\) must have dtype torch.bool"),
    ("trix explicit", "router.is_free_E", lambda v: v.fill_(True), r"in reach by is_free_E \(0\) must be >= top_k .* \(1\)"),
    ("trix explicit", "router.num_raised", lambda v: v.fill_(6), r"in reach by is_free_E \(6\) must be >= top_k .* \(7\)"),
    ("trix explicit", "router.num_raised", lambda v: v.fill_(-1), r"num_raised \(-1\) must be >= 0"),
    ("trix explicit", "router.num_raised", lambda v: v.float(), r"num_raised \(torch.float32\) must have dtype torch.int64"),
    ("trix explicit", "router.log_mass_E", first_set_to(NAN), r"log_mass_E \(nan\) must be finite"),
    ("trix explicit", "router.log_mass_E", first_set_to(float("inf")), r"log_mass_E \(inf\) must be finite"),
    ("trix explicit", "router.balance_bias", first_set_to(NAN), r"balance_bias\[0\] \(nan\) must be a number"),
    ("trix explicit", "surgery_log.step", lambda v: v.fill_(-3), r"step \(-3\) must be >= 0"),
    ("hierarchical", "router.members_CM", first_set_to(1), r"members_CM \(\[.*\]\) must hold each of the 6 tiles once"),
    ("hierarchical", "router.members_CM", first_set_to(-1), r"members_CM \(\[.*\]\) must hold each of the 6 tiles once"),
    ("lookup", "usage_E", first_set_to(-1), r"usage_E \(-1\) must be >= 0"),
    ("lookup", "claims.count_EC", first_set_to(-1), r"count_EC \(-1\) must be >= 0"),
]


@pytest.mark.parametrize(("name", "key", "change", "message"), FORGED)
@pytest.mark.parametrize("strict", [True, False])
def test_facts_that_cannot_be_are_refused(
    name: str, key: str, change: Callable[[Tensor], Tensor], message: str, strict: bool
) -> None:
    state = LAYERS[name]().state_dict()
    with_value(key, change)(state)
    with pytest.raises(ValueError, match=message) as error:
        LAYERS[name]().load_state_dict(state, strict=strict)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["router.frozen_value_ED", "router.num_raised", "surgery_log.step"])
def test_facts_of_another_size_are_a_size_mismatch(key: str) -> None:
    state = TriXFFN(WIDTH, NUM_TILES).state_dict()
    state[key] = state[key].expand(2, *state[key].shape)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: shape \(2,.*\) must be \("):
        TriXFFN(WIDTH, NUM_TILES).load_state_dict(state, strict=False)


ENTRY: dict[str, Any] = {"operation": "freeze", "tile_idx": 1, "step": 0, "tag": ""}


def as_text(entries: object) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def as_bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


HISTORIES: list[tuple[Tensor, str]] = [
    (torch.ones(3), r"surgery history \(\(3,\) torch.float32\) must be a torch.uint8 tensor of one dimension"),
    (torch.full((3,), NAN), r"\(\(3,\) torch.float32\) must be a torch.uint8 tensor"),
    (torch.zeros(2, 2, dtype=torch.uint8), r"\(\(2, 2\) torch.uint8\) must be a torch.uint8 tensor of one dimension"),
    (torch.zeros(2**24 + 1, dtype=torch.uint8), r"\(16777217 bytes\) must have at most 16777216 bytes"),
    (as_bytes(b"[" * 200_000 + b"]" * 200_000), r"depth of the surgery history must be <= 100"),
    (as_bytes(b'{"a":' * 200_000), r"depth of the surgery history must be <= 100"),
    (as_bytes(b'"' + b"[" * 200_000), r"must be"),
    (as_bytes(b"\xff\xfe"), r"surgery history \(2 bytes\) must be JSON in UTF-8: 'utf-8' codec"),
    (as_bytes(b""), r"surgery history \(0 bytes\) must be JSON in UTF-8"),
    (as_bytes(b"[1" + b"0" * 5000 + b"]"), r"must be JSON in UTF-8: Exceeds the limit"),
    (as_text({}), r"surgery history \(dict\) must be a list"),
    (as_text([1]), r"surgery history\[0\] \(int\) must be a dict"),
    (as_text([ENTRY, {}]), r"surgery history\[1\].operation \(NoneType\) must be of type str"),
    (as_text([ENTRY | {"step": 1.5}]), r"surgery history\[0\].step \(float\) must be of type int"),
    (as_text([ENTRY | {"step": True}]), r"surgery history\[0\].step \(bool\) must be of type int"),
    (as_text([ENTRY | {"step": -1}]), r"surgery history\[0\].step \(-1\) must be >= 0"),
    (as_text([ENTRY | {"tag": None}]), r"surgery history\[0\].tag \(NoneType\) must be of type str"),
    (as_text([ENTRY | {"tile_idx": 6}]), r"surgery history\[0\].tile_idx \(6\) must be >= -1 and < num_tiles \(6\)"),
    (as_text([ENTRY | {"tile_idx": -2}]), r"surgery history\[0\].tile_idx \(-2\) must be >= -1 and < num_tiles \(6\)"),
]


@pytest.mark.parametrize(("history", "message"), HISTORIES, ids=[message for _, message in HISTORIES])
def test_a_forged_history_is_refused_in_one_line(history: Tensor, message: str) -> None:
    layer = TriXFFN(WIDTH, NUM_TILES)
    with pytest.raises(ValueError, match=message) as error:
        layer.load_state_dict(layer.state_dict() | {HISTORY: history}, strict=False)
    assert "\n" not in str(error.value)
    assert layer.get_surgery_history() == []


def test_a_history_with_brackets_in_its_tags_and_an_act_on_all_tiles_loads() -> None:
    layer, other = TriXFFN(WIDTH, NUM_TILES), TriXFFN(WIDTH, NUM_TILES)
    layer.freeze_signature(5, tag='"\\' + "[{" * 200)
    layer.surgery_log.record("raise_k", -1, "", top_k=2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.get_surgery_history() == layer.get_surgery_history()
