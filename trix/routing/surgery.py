"""Surgery: reading, writing, freezing and removing the signatures of a routed layer, and the record of every such operation."""

import copy
import json
from typing import Any

import torch
from torch import Tensor

from trix.functional.signatures import signature_diversity
from trix.routing.base_router import Router
from trix.routing.facts import Fact, Facts, check_counts
from trix.routing.pending import is_in_backward
from trix.routing.router import FROZEN_FACTS, SignatureRouter, check_frozen_facts

MAX_HISTORY_BYTES, MAX_HISTORY_DEPTH = 2**24, 100
ALL_TILES = -1  # the tile_idx in the history of an act on the whole layer
HISTORY_KEYS = {"operation": str, "tile_idx": int, "step": int, "tag": str}


class SurgeryLog(Facts):
    """What was done to a layer's tiles and when. It travels with the layer: state_dict, deepcopy and checkpoint keep it.

    Args:
        num_tiles: tiles that a loaded history may name; None for any.

    Attributes:
        step: int64 scalar, the training batches that the layer has seen; the layer calls :meth:`count_step`.

    The history stands in the state_dict as JSON text in a uint8 tensor, so that every value there is a tensor.

    Raises:
        ValueError: by load_state_dict, for a text that is not such a history, or a step below 0.
    """

    step = Fact[Tensor]()
    _entries = Fact[list[dict[str, Any]]]()

    def __init__(self, num_tiles: int | None = None) -> None:
        super().__init__()
        self.num_tiles = num_tiles
        self.hold("step", torch.zeros((), dtype=torch.int64))
        self.hold("_entries", [])

    def count_step(self) -> None:
        self.step.add_(1)
        self.note_change()

    def record(self, operation: str, tile_idx: int, tag: str = "", **details: Any) -> None:
        """Append one operation. details: JSON-like values.

        Raises:
            TypeError: a detail that JSON cannot hold.
        """
        step = 0 if self.step.is_meta else int(self.step)  # a sketch of a layer has no values
        entry = {"operation": operation, "tile_idx": tile_idx, "step": step, "tag": tag, **details}
        self._entries.append(json.loads(json.dumps(entry)))
        self.stand_alone()
        self.note_change()

    def history(self) -> list[dict[str, Any]]:
        """The operations in order, as a copy."""
        return copy.deepcopy(self._entries)

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(self._entries).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self._entries = _history_from(state, self.num_tiles)

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        checked = super()._checked(name, value)
        check_counts(name, checked)
        return checked


def _history_from(state: object, num_tiles: int | None) -> list[dict[str, Any]]:
    """The entries of a history from its text, which may come from anybody.

    Raises:
        ValueError: it is not what :meth:`SurgeryLog.get_extra_state` writes.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        found = f"{tuple(state.shape)} {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"surgery history ({found}) must be a torch.uint8 tensor of one dimension")
    if len(state) > MAX_HISTORY_BYTES:
        raise ValueError(f"surgery history ({len(state)} bytes) must have at most {MAX_HISTORY_BYTES} bytes")
    text = state.cpu().numpy().tobytes()
    try:
        entries = json.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"surgery history ({len(text)} bytes) must be JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError(f"depth of the surgery history must be <= {MAX_HISTORY_DEPTH}") from error
    _check_depth(entries)
    if not isinstance(entries, list):
        raise ValueError(f"surgery history ({type(entries).__name__}) must be a list")
    for index, entry in enumerate(entries):
        _check_entry(f"surgery history[{index}]", entry, num_tiles)
    return entries


def _check_depth(value: object) -> None:
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        if inner and depth > MAX_HISTORY_DEPTH:
            raise ValueError(f"depth of the surgery history must be <= {MAX_HISTORY_DEPTH}")
        waiting += [(one, depth + 1) for one in inner]


def _check_entry(name: str, entry: object, num_tiles: int | None) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} ({type(entry).__name__}) must be a dict")
    for key, kind in HISTORY_KEYS.items():
        if type(entry.get(key)) is not kind:  # True is no step
            raise ValueError(f"{name}.{key} ({type(entry.get(key)).__name__}) must be of type {kind.__name__}")
    check_counts(f"{name}.step", entry["step"])
    tile_idx = entry["tile_idx"]
    if tile_idx < -1 or (num_tiles is not None and tile_idx >= num_tiles):
        limit = "" if num_tiles is None else f" and < num_tiles ({num_tiles})"
        raise ValueError(f"{name}.tile_idx ({tile_idx}) must be >= -1{limit}")


class SignatureSurgery(Facts):
    """What all layers routed by signatures share; a layer derives from it and sets ``router``.

    A frozen signature is a value stored next to the learned one and used in its place, so neither gradient, momentum, weight
    decay nor a regulariser can move it. Every operation is checked first: an error leaves the layer as it was.

    A training forward changes nothing that a forward reads: the router moves after the backward pass, so that activation
    checkpointing computes again what was computed. A forward that runs inside a backward pass is such a repetition, and is
    not counted.

    Args:
        num_tiles: tiles that a loaded history may name; None for any.

    Raises:
        ValueError: by all methods, for a tile that does not exist, a router without signatures, or one that is packed.
    """

    router: Router

    def __init__(self, num_tiles: int | None = None) -> None:
        super().__init__()
        self.surgery_log = SurgeryLog(num_tiles)

    def insert_signature(self, tile_idx: int, signature: Tensor, freeze: bool = True, tag: str = "") -> None:
        """Give one tile a designed signature.

        Args:
            signature: [D] in {-1, 0, +1}, any dtype. freeze: hold it there; without it, learning goes on from it (``explicit``
                routing only: an emergent signature is read from its tile, so an inserted one lasts only while frozen).
            tag: a name for the history.

        Raises:
            ValueError: a wrong shape, or a value outside {-1, 0, +1} (NaN too).
        """
        self._signature_router().insert(tile_idx, signature, freeze)
        positive_dims, negative_dims = _active_dims(signature)
        self.surgery_log.record(
            "insert", tile_idx, tag, frozen=freeze, positive_dims=positive_dims, negative_dims=negative_dims
        )

    def freeze_signature(self, tile_idx: int, tag: str = "") -> None:
        """Hold one tile's signature at its present value: no optimizer can move it."""
        self._signature_router().freeze(tile_idx, self.emergent_signatures())
        self.surgery_log.record("freeze", tile_idx, tag)

    def freeze_all_signatures(self, tag: str = "") -> None:
        """As :meth:`freeze_signature`, of every tile in use; one operation in the history."""
        self._signature_router().freeze_all(self.emergent_signatures())
        self.surgery_log.record("freeze", ALL_TILES, tag)

    def unfreeze_signature(self, tile_idx: int, tag: str = "") -> None:
        """Let one tile's signature learn from its frozen value on (explicit), or follow its weights again (emergent)."""
        self._signature_router().unfreeze(tile_idx)
        self.surgery_log.record("unfreeze", tile_idx, tag)

    def unfreeze_all_signatures(self, tag: str = "") -> None:
        """As :meth:`unfreeze_signature`, of every tile; one operation in the history."""
        self._signature_router().unfreeze_all()
        self.surgery_log.record("unfreeze", ALL_TILES, tag)

    def remove_tile(self, tile_idx: int, tag: str = "") -> None:
        """Take one tile out of use: no token goes to it, and it counts for nothing in the gates of the others.

        Its weights stay where they are; a signature inserted into the free slot brings it back into use.

        Raises:
            ValueError: a free slot, a frozen signature, or fewer tiles left than a token goes to.
        """
        self._signature_router().remove(tile_idx)
        self.surgery_log.record("remove", tile_idx, tag)

    def is_frozen(self, tile_idx: int) -> bool:
        return self._signature_router().is_frozen(tile_idx)

    def frozen_tiles(self) -> Tensor:
        """Which tiles have a frozen signature: bool [E]; none where signatures do not route."""
        return self.router.frozen_tiles()

    def free_slots(self) -> Tensor:
        """Which slots no token can go to, as a merger of two tiles left them: bool [E]; none where signatures do not route."""
        return self.router.free_slots()

    def get_signature_analysis(self, tile_idx: int) -> dict[str, int | bool | list[int]]:
        """The signature in force, for reading: tile_idx, positive_dims, negative_dims, zero_count, frozen."""
        is_frozen = self.is_frozen(tile_idx)
        signature_D = self.get_tile_signatures()[tile_idx]
        positive_dims, negative_dims = _active_dims(signature_D)
        return {
            "tile_idx": tile_idx,
            "positive_dims": positive_dims,
            "negative_dims": negative_dims,
            "zero_count": int((signature_D == 0).sum()),
            "frozen": is_frozen,
        }

    def get_surgery_history(self) -> list[dict[str, Any]]:
        """Every operation in order: operation, tile_idx, step (training batches seen), tag, and what else it says of itself."""
        return self.surgery_log.history()

    def get_tile_signatures(self) -> Tensor:
        """Signatures in force: [E, D] in {-1, 0, +1}."""
        return self._signature_router().signatures(self.emergent_signatures()).detach()

    def get_raw_signatures(self) -> Tensor:
        """What the signatures in force are the ternary form of: float [E, D], with frozen values in their places."""
        return self._signature_router().raw(self.emergent_signatures()).detach()

    def get_signature_diversity(self) -> float:
        """Mean over pairs of tiles of the fraction of positions at which their signatures differ, in [0, 1]."""
        return float(signature_diversity(self.get_tile_signatures()))

    def _begin_forward(self) -> None:
        """What a training forward does first: let earlier batches move the router, where no backward pass needs the old one."""
        if torch.compiler.is_compiling() or is_in_backward():
            return
        self.router.share()
        self.router.settle()

    def _count_batch(self, tile_idx_TK: Tensor, weight_TK: Tensor | None) -> None:
        """Count the batch of a training forward, unless it has been counted before."""
        if torch.compiler.is_compiling():  # the graph keeps the values that its backward needs
            self.router.update_balance(tile_idx_TK, weight_TK)
        elif is_in_backward():
            return
        else:
            self.router.add_batch(tile_idx_TK, weight_TK)
        self.surgery_log.count_step()

    def _end_forward(self, y: Tensor) -> None:
        """What a training forward does last: see to it that its batch moves the router in time."""
        if torch.compiler.is_compiling():
            return
        if is_in_backward():
            self.router.pending.note_recomputation(self._after_backward)
        elif not self.router.pending.wait_for(y, self._after_backward):
            self.router.settle()

    def _after_backward(self) -> None:
        for facts in (self, self.router, self.surgery_log):
            facts.stand_alone()  # a module that learns is no longer an average
        self.router.settle()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(self.router, SignatureRouter):
            names = (*(f"router.{name}" for name in FROZEN_FACTS), "surgery_log._extra_state")
            check_frozen_facts(self, state_dict, prefix, names, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def emergent_signatures(self) -> Tensor | None:
        """What the tiles' weights say, [E, D]; None where the router holds the signatures itself."""
        return None

    def _signature_router(self) -> SignatureRouter:
        if not isinstance(self.router, SignatureRouter):
            raise ValueError(
                f"a router of type {type(self.router).__name__} has no signatures to freeze or insert; "
                "use routing 'explicit' or 'emergent'"
            )
        return self.router


def _active_dims(signature_D: Tensor) -> tuple[list[int], list[int]]:
    return (signature_D > 0).nonzero().flatten().tolist(), (signature_D < 0).nonzero().flatten().tolist()
