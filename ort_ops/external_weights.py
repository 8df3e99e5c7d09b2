"""Tensors of an ONNX graph whose bytes lie in external data: read, handed to a session, moved there.

All of it is for models that :func:`~ort_ops.external_data.check_external_data` has passed. Needs onnx, onnxruntime and numpy.
"""

from collections.abc import Collection, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ort_ops.external_data import ALIGNMENT, INLINE_BYTES
from trix.regular_files import open_regular


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def weight_bytes(proto: ModelProto) -> int:
    """Bytes of all tensors stored in the model itself."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def has_large_weights(proto: ModelProto) -> bool:
    """Does :func:`move_out` move anything?"""
    return any(is_external(tensor) or len(tensor.raw_data) > INLINE_BYTES for tensor in proto.graph.initializer)


def tensor_bytes(tensor: TensorProto, folder: Path) -> bytes:
    """The elements, little-endian. folder: that of the model."""
    if not is_external(tensor):
        return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    place = {entry.key: entry.value for entry in tensor.external_data}
    with open_regular(folder / place["location"]) as file:
        file.seek(int(place.get("offset", 0)))
        return file.read(_num_bytes(tensor, place))


def _num_bytes(tensor: TensorProto, place: dict[str, str]) -> int:
    if "length" in place:
        return int(place["length"])
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def load(proto: ModelProto, folder: Path, names: Collection[str]) -> None:
    """Take those tensors of external data into the model that have one of the names, or are small."""
    for tensor in filter(is_external, proto.graph.initializer):
        content = tensor_bytes(tensor, folder) if tensor.name in names or _is_small(tensor) else None
        if content is not None:
            tensor.raw_data = content
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")


def _is_small(tensor: TensorProto) -> bool:
    return _num_bytes(tensor, {entry.key: entry.value for entry in tensor.external_data}) <= INLINE_BYTES


def session_of(proto: ModelProto, folder: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session of a model in memory, whose external data is in the folder."""
    outside = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
    if outside:
        values = [ort.OrtValue.ortvalue_from_numpy(_to_array(tensor, folder)) for tensor in outside]
        options.add_external_initializers([tensor.name for tensor in outside], values)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _to_array(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(tensor_bytes(tensor, folder), dtype=dtype).reshape(tuple(tensor.dims))


def digests(proto: ModelProto, folder: Path) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """Type, shape and digest of each constant, wherever its elements lie."""
    return {
        tensor.name: (tensor.data_type, tuple(tensor.dims), sha256(tensor_bytes(tensor, folder)).hexdigest())
        for tensor in proto.graph.initializer
        if tensor.data_type != TensorProto.STRING
    }


def _moved(proto: ModelProto, folder: Path) -> Iterator[tuple[TensorProto, int, bytes]]:
    """Each tensor that is not small, its offset in a data file, and its elements. folder: where external data is now."""
    end = 0
    for tensor in proto.graph.initializer:
        content = b"" if tensor.data_type == TensorProto.STRING else tensor_bytes(tensor, folder)
        if len(content) > INLINE_BYTES:
            offset = end + -end % ALIGNMENT
            end = offset + len(content)
            yield tensor, offset, content


def data_digest(proto: ModelProto, folder: Path) -> str:
    """SHA-256 of the data file that :func:`move_out` writes."""
    digest, end = sha256(), 0
    for _, offset, content in _moved(proto, folder):
        digest.update(bytes(offset - end))
        digest.update(content)
        end = offset + len(content)
    return digest.hexdigest()


def move_out(proto: ModelProto, data: Path, folder: Path) -> None:
    """Write all tensors that are not small to a data file and let the model name it. folder: where external data is now."""
    with data.open("wb") as file:
        for tensor, offset, content in _moved(proto, folder):
            file.write(bytes(offset - file.tell()))
            file.write(content)
            tensor.CopyFrom(external_tensor(tensor.name, tensor.data_type, tensor.dims, data.name, offset, len(content)))


def external_tensor(name: str, kind: int, shape: Sequence[int], location: str, offset: int, length: int) -> TensorProto:
    """A tensor whose bytes lie in another file. kind: ONNX's number of its type."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def set_location(proto: ModelProto, name: str) -> None:
    """Name another data file, that the one that all external tensors lie in is about to become."""
    for tensor in filter(is_external, proto.graph.initializer):
        next(entry for entry in tensor.external_data if entry.key == "location").value = name
