"""Models that several tests export are traced by torch once in a session, also where they run in several processes.

A trace takes seconds, and its graph is determined by the module, all values in it included, and the sizes of the examples:
their digest is its name in a folder of the session. Every file is still put together, verified against torch and written for
each test. Exports of user modules also need torch's `ExportedProgram`, which cannot be stored in the folder; their traces are
shared only within a process.
Tests that change how a module is traced ask for `traced_anew`.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.onnx._internal._lazy_import import onnxscript_apis

from ort_ops import tracing
from ort_ops.own_module import FlatModule
from ort_ops.tracing import Interface, Traced


def sharing_traces(folder: Path) -> Callable[[Any, Interface], Traced]:
    """`ort_ops.tracing.trace` with a store in the folder."""
    in_process: dict[str, tuple[bytes, torch.export.ExportedProgram]] = {}

    def trace(packed: Any, interface: Interface) -> Traced:
        wrapped = interface.wrapper(packed).eval()
        try:
            names = interface.input_names, interface.output_names
            path = folder / digest((wrapped, sizes(interface.examples), repr(interface.dynamic_shapes), names))
        except (pickle.PicklingError, AttributeError, TypeError):  # what cannot be pickled
            return tracing.trace(packed, interface)
        if path.name in in_process:
            content, program = in_process[path.name]
            return Traced(onnx.load_model_from_string(content), wrapped, program)
        if path.exists():
            return Traced(onnx.load_model(path), wrapped, None)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):  # as where it is read
            traced = tracing.trace(packed, interface)
        content = traced.proto.SerializeToString()
        if interface.wrapper is FlatModule:
            in_process[path.name] = content, traced.program
            return traced
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
        return traced

    return trace


def torchlib_read_once(patch: pytest.MonkeyPatch) -> None:
    """Torch parses the Python source of all its translations for every export; here it does so once in a process.

    The place is private to torch: a newer torch may have another one.
    """
    patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))


def sizes(examples: Any) -> Any:
    if isinstance(examples, Tensor):
        return str(examples.dtype), tuple(examples.shape)
    return [sizes(example) for example in examples]


def digest(content: Any) -> str:
    """Equal where classes, attributes and the values of tensors are equal."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.fast = True  # or texts that are one object would differ from equal ones that are two
    pickler.dump(content)
    return hashlib.sha256(file.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes tensors by value, each storage with the number of the tensor that showed it first."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        number = self._numbers.setdefault(value.untyped_storage().data_ptr(), len(self._numbers))
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return type(value).__name__, str(value.dtype), tuple(value.shape), number, hashlib.sha256(content).hexdigest()
