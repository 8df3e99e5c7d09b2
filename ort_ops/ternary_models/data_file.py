"""The tensors of a model, written to its external data one after the other: none has to be in memory with another."""

import math
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ort_ops.external_data import ALIGNMENT, INLINE_BYTES
from ort_ops.external_weights import external_tensor


class DataFile:
    """Takes tensors, and has for each one the entry of the graph that names its place in the file.

    Attributes:
        tensors: the initializers of the graph, in the order in which they came. Tensors of at most 1024 bytes hold their bytes
            themselves: onnxruntime needs the values of shapes when it loads a model.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.tensors: list[TensorProto] = []

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Write a tensor; returns its name, for the nodes that read it."""
        if array.nbytes <= INLINE_BYTES:
            self.tensors.append(numpy_helper.from_array(array, name))
            return name
        return self.add_parts(name, array.dtype, array.shape, [array])

    def add_parts(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[NDArray[Any]]) -> str:
        """Write a tensor that comes in parts along its first axis.

        Raises:
            ValueError: the parts together are not of that shape.
        """
        offset = self._file.tell() + -self._file.tell() % ALIGNMENT
        self._file.write(bytes(offset - self._file.tell()))
        for part in parts:
            self._file.write(np.ascontiguousarray(part, dtype=dtype.newbyteorder("<")).data)
        length, expected = self._file.tell() - offset, math.prod(shape) * dtype.itemsize
        if length != expected:
            raise ValueError(f"parts of tensor {name} ({length} bytes) must be those of its shape {shape} ({expected} bytes)")
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        self.tensors.append(external_tensor(name, kind, shape, self._name, offset, length))
        return name
