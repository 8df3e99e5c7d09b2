"""Facts: what is held in a module, whatever is done to its weights."""

import copy
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from trix.routing.balance import num_processes

ValueT = TypeVar("ValueT")
# Marks run through all whole numbers below 2**23, which float32 holds exactly; each is far from those just before it, so that
# even a slow average moves visibly. They are floats, because torch averages no whole numbers on a GPU.
NUM_MARKS, STRIDE = 2**23, 5_184_445


class Fact(Generic[ValueT]):
    """One fact of a :class:`Facts` module as an attribute: read as the module holds it now, written in place or as a whole."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: type) -> Self: ...
    @overload
    def __get__(self, module: "Facts", owner: type) -> ValueT: ...
    def __get__(self, module: "Facts | None", owner: type) -> Self | ValueT:
        return self if module is None else module.held_values()[self.name]

    def __set__(self, module: "Facts", value: ValueT) -> None:
        module.held_values()[self.name] = value
        module.note_change()


class _Held:
    """The facts of one module by name; ``origin`` holds those that it was copied from, while it may still be their average."""

    def __init__(self, values: dict[str, Any], origin: "_Held | None" = None) -> None:
        self.values, self.origin = values, origin

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        copied = memo[id(self)] = _Held({}, origin=self)
        copied.values = copy.deepcopy(self.values, memo)
        # Where an average is copied together with its original, the copies are such a pair, too, whichever comes first.
        key = (_Held, id(self))
        if self.origin is not None and id(self.origin) in memo:
            copied.origin = memo[id(self.origin)]
        elif self.origin is not None:
            memo.setdefault(cast(int, (_Held, id(self.origin))), []).append(copied)
        for follower in memo.pop(cast(int, key), []):
            follower.origin = copied
        return copied

    def __reduce__(self) -> tuple[type["_Held"], tuple[dict[str, Any], "_Held | None"]]:
        return _Held, (self.values, self.origin)


class Facts(nn.Module):
    """A module with state that is true or false, but never nearly true: flags, counts, frozen values, a history.

    Facts are not weights, so they are neither parameters nor buffers: nothing that averages, casts or shards these can move
    them. They move with the module from device to device, and stand in its state_dict under their names.

    An average of weights is a deep copy into which somebody writes the weights of the original from time to time. It has to
    have the original's facts, while a deep copy that serves as a backup keeps its own. The one buffer of the module,
    ``mark``, tells the two apart: it gets another number with every change of the facts. A copy leaves its own as it is; when
    it finds another number there, it is an average, and takes over the facts of the original as they are then. A copy that
    learns, or whose facts somebody changes, is no average any more: :meth:`stand_alone`.

    Source of the idea: torchmetrics keeps its states out of the buffers, too.

    Raises:
        ValueError: by load_state_dict, for a fact of another kind of number, not finite, or below 0 where it counts.
    """

    mark: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._held = _Held({})
        self._known_mark: float | None = None  # as it was when the module was copied or last looked
        self._seen_mark: tuple[int, int] | None = None  # the tensor and its version where that was last compared
        self._is_shared = False

    def hold(self, name: str, value: object) -> None:
        """Add a fact, a tensor first. Tensors and numbers stand in the state_dict; for others see to it (extra state)."""
        if "mark" not in self._buffers:
            self.register_buffer("mark", torch.zeros((), dtype=torch.float32), persistent=False)
        self._held.values[name] = value

    def held_values(self) -> dict[str, Any]:
        """The facts by name, to be read or written; what is written is followed by :meth:`note_change`."""
        if not torch.compiler.is_compiling() and "mark" in self._buffers:
            self._follow()
            self._stay_on_device()
        return self._held.values

    @torch.no_grad()
    def note_change(self) -> None:
        """Let the averages of this module know that its facts have changed."""
        if "mark" in self._buffers and self._held.origin is None:
            self.mark.add_(STRIDE).remainder_(NUM_MARKS)

    def stand_alone(self) -> None:
        """From now on the facts are this module's own, whatever is averaged into it."""
        self._held.origin = None

    def share(self) -> None:
        """Take over the tensors among the facts of the first process, once; all processes that train together call it.

        DDP does so with parameters and buffers alone.
        """
        if not self._is_shared and num_processes() > 1:
            for value in self.held_values().values():
                if isinstance(value, Tensor):
                    torch.distributed.broadcast(value, src=0)
            self._is_shared = True

    def _follow(self) -> None:
        origin, mark = self._held.origin, self.mark
        if origin is None or mark.is_meta:
            return
        state = _state_of(mark)
        if state is not None and state == self._seen_mark:
            return  # so that a device need not be waited for
        number = float(mark)
        if self._known_mark is not None and number != self._known_mark:
            self._take_over(origin.values)
        self._known_mark, self._seen_mark = number, state

    @torch.no_grad()
    def _take_over(self, values: dict[str, Any]) -> None:
        with torch.inference_mode(False):  # these tensors outlive the evaluation that may be running
            for name, value in values.items():
                own = self._held.values[name]
                is_tensor = isinstance(value, Tensor)
                self._held.values[name] = (
                    value.to(self.mark.device, own.dtype, copy=True) if is_tensor else copy.deepcopy(value)
                )

    def _stay_on_device(self) -> None:
        """FSDP moves parameters and buffers itself, without calling :meth:`torch.nn.Module.to`."""
        device, values = self.mark.device, self._held.values
        if next(iter(values.values())).device == device or device.type == "meta":
            return  # they move together
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "mark" in self._buffers:
            self._follow()
            state["_known_mark"] = None if self.mark.is_meta else float(self.mark)
            state["_seen_mark"] = None
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if "mark" not in self._buffers:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        values, mark = self.held_values(), self.mark
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if mark.is_meta and not self.mark.is_meta:
            self.mark.zero_()  # what it came from had no value
        elif self.mark.dtype != mark.dtype:
            self.mark = mark.to(self.mark.device)  # a cast has rounded it
        if self._seen_mark is not None:
            self._seen_mark = _state_of(self.mark)
        with torch.no_grad():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = moved(value, fn(value))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values = self.held_values()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in values.items():
            if isinstance(value, Tensor):
                destination[prefix + name] = value.clone()
            elif isinstance(value, int):
                destination[prefix + name] = torch.tensor(value, device=self.mark.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        values = self.held_values()
        names = [name for name, value in values.items() if isinstance(value, Tensor | int)]
        missing_keys.extend(prefix + name for name in names if strict and prefix + name not in state_dict)
        # Taken out, for what is neither parameter nor buffer is unexpected to torch.
        found = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        for name, value in list(found.items()):
            shape = () if isinstance(values[name], int) else tuple(values[name].shape)
            if tuple(value.shape) != shape:  # as torch says it of a weight
                error_msgs.append(f"size mismatch for {prefix}{name}: shape {tuple(found.pop(name).shape)} must be {shape}")
        loaded = {name: self._checked(name, value) for name, value in found.items() if not value.is_meta}
        self._check_together(values | loaded)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        is_assigned = local_metadata.get("assign_to_params_buffers", False)
        for name, value in loaded.items():
            if isinstance(value, int):
                values[name] = value
            elif is_assigned or not values[name].is_meta:
                values[name] = value.to(value.device if values[name].is_meta else values[name].device, copy=True)
                if self.mark.is_meta:
                    self.mark = torch.zeros((), dtype=torch.float32, device=value.device)
        if loaded:
            self.note_change()

    def _checked(self, name: str, value: Tensor) -> Tensor | int:
        """What a state_dict holds of one fact, in the form in which the module holds it."""
        own = self._held.values[name]
        dtype = torch.int64 if isinstance(own, int) else own.dtype
        if _kind(value.dtype) != _kind(dtype):
            raise ValueError(f"{name} ({value.dtype}) must have dtype {dtype}")
        check_finite(name, value)
        return int(value) if isinstance(own, int) else value.to(dtype)

    def _check_together(self, values: dict[str, Any]) -> None:
        """Raises ValueError where facts that are about to be loaded do not fit each other; for the module to override."""


def check_counts(name: str, value: Tensor | int) -> None:
    """Raises ValueError for a count below 0."""
    lowest = value if isinstance(value, int) else int(value.min())
    if lowest < 0:
        raise ValueError(f"{name} ({lowest}) must be >= 0")


def check_finite(name: str, value: Tensor) -> None:
    """Raises ValueError for NaN and infinite floats."""
    is_bad = ~value.isfinite()
    if bool(is_bad.any()):
        raise ValueError(f"{name} ({float(value[is_bad][0])}) must be finite")


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "integer"


def _state_of(mark: Tensor) -> tuple[int, int] | None:
    """A value that changes with every write that autograd sees; None where autograd sees none."""
    return None if mark.is_inference() else (id(mark), mark._version)


def moved(value: Tensor, cast: Tensor) -> Tensor:
    """The value on the device of what a move or cast has made of it, in its own kind of numbers, floats in at least float32.

    Zeros where there was none to move.
    """
    dtype = torch.promote_types(cast.dtype, torch.float32) if value.is_floating_point() else value.dtype
    if value.is_meta and not cast.is_meta:
        return torch.zeros_like(value, device=cast.device, dtype=dtype)
    return cast if cast.dtype == dtype else value.to(cast.device, dtype)
