"""Surgery: reading, writing, freezing and removing the signatures of a routed layer, and the record of every such operation."""

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from trix.functional.signatures import signature_diversity
from trix.routing.router import SignatureRouter


class SurgeryLog(nn.Module):
    """What was done to a layer's tiles and when. It travels with the layer: state_dict, deepcopy and checkpoint keep it.

    Attributes:
        step: int64 scalar, the training batches that the layer has seen; the layer calls :meth:`count_step`.

    The history stands in the state_dict as JSON text in a uint8 tensor, so that every value there is a tensor.
    """

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._entries: list[dict[str, Any]] = []

    def count_step(self) -> None:
        self.step += 1

    def record(self, operation: str, tile_idx: int, tag: str = "", **details: Any) -> None:
        """Append one operation. details: JSON-like values.

        Raises:
            TypeError: a detail that JSON cannot hold.
        """
        entry = {"operation": operation, "tile_idx": tile_idx, "step": int(self.step), "tag": tag, **details}
        self._entries.append(json.loads(json.dumps(entry)))

    def history(self) -> list[dict[str, Any]]:
        """The operations in order, as a copy."""
        return copy.deepcopy(self._entries)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self._entries).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self._entries = json.loads(bytes(state.tolist()))


class SignatureSurgery(nn.Module):
    """What all layers routed by signatures share; a layer derives from it and sets ``router``.

    A frozen signature is a value stored beside the learned one and used in its place, so neither gradient, momentum, weight
    decay nor a regulariser can move it. Every operation is checked first: an error leaves the layer as it was.

    Raises:
        ValueError: by all methods, for a tile that does not exist, a router without signatures, or one that is packed.
    """

    router: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.surgery_log = SurgeryLog()

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
        self._signature_router().freeze(tile_idx, self._emergent_signatures())
        self.surgery_log.record("freeze", tile_idx, tag)

    def unfreeze_signature(self, tile_idx: int, tag: str = "") -> None:
        """Let one tile's signature learn from its frozen value on (explicit), or follow its weights again (emergent)."""
        self._signature_router().unfreeze(tile_idx)
        self.surgery_log.record("unfreeze", tile_idx, tag)

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
        return self._signature_router().signatures(self._emergent_signatures()).detach()

    def get_raw_signatures(self) -> Tensor:
        """What the signatures in force are the ternary form of: float [E, D], with frozen values in their places."""
        return self._signature_router().raw(self._emergent_signatures()).detach()

    def get_signature_diversity(self) -> float:
        """Mean over pairs of tiles of the fraction of positions at which their signatures differ, in [0, 1]."""
        return float(signature_diversity(self.get_tile_signatures()))

    def _emergent_signatures(self) -> Tensor | None:
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
