"""What a file says of itself, as one typed record."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ort_ops.file_format import ARRAY_KINDS, Activations, FileRecord, LayerRecord, decode_array, encode_array
from ort_ops.reference import ModuleReference

RECORD = FileRecord(
    task="language_model",
    float32_bytes=40,
    config={"d_model": 4},
    activations=Activations(8, 0),
    vocabulary="ab",
    context_length=7,
    reference={"input": [[0, 1]]},
    export_parity={"num_tokens": 2},
    drift={"top_agreement": 1.0},
    layers=[LayerRecord(kind="TriXFFN", frozen=[1], d_model=4, claims=[[1, 2]])],
)


def test_a_record_survives_the_properties_of_a_file() -> None:
    properties = RECORD.to_properties()
    assert all(key.startswith("trix.") and isinstance(value, str) for key, value in properties.items())
    assert FileRecord.from_properties(properties) == RECORD
    assert FileRecord.from_properties(properties | {"trix.of_a_later_version": "5", "other": "no JSON"}) == RECORD


def test_files_without_records_and_widths_are_read() -> None:
    properties = RECORD.to_properties()
    old = json.loads(properties["trix.layers"])
    del old[0]["d_model"], properties["trix.activations"]
    read = FileRecord.from_properties(properties | {"trix.layers": json.dumps(old)})
    assert read.layers == [LayerRecord(kind="TriXFFN", frozen=[1], claims=[[1, 2]])]
    assert read.activations == Activations()
    del properties["trix.layers"]
    assert FileRecord.from_properties(properties).layers is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", 5, r"metadata task \(5\) must be of type str"),
        ("float32_bytes", None, r"metadata float32_bytes \(None\) must be of type int"),
        ("float32_bytes", -1, r"float32_bytes \(-1\) must be >= 1"),
        ("context_length", True, r"metadata context_length \(True\) must be of type int"),
        ("context_length", 2**21, r"context_length \(2097152\) must be >= 1 and <= 1048576"),
        ("config", [], r"metadata config \(\[\]\) must be of type dict"),
        ("class_names", ["a", 1], r"metadata class_names \(\['a', 1\]\) must be texts"),
        ("activations", {"bits": 5}, r"bits of the activations \(5\) must be 24 or 8"),
        ("activations", [8], r"metadata activations \(\[8\]\) must hold bits and group_size"),
        ("layers", {}, r"metadata layers \({}\) must be of type list"),
        ("layers", [{"colour": 1}], r"metadata of a layer \(.*\) must have the keys kind, source, .*, d_model"),
        ("layers", [{"d_model": 0}], r"d_model of a layer \(0\) must be >= 1"),
        ("layers", [{"frozen": [0.5]}], "metadata of a layer .* must hold lists of tiles"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_rule(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FileRecord.from_properties(RECORD.to_properties() | {f"trix.{key}": json.dumps(value)})


def test_what_a_task_needs_is_asked_for() -> None:
    record = FileRecord(task="module", module="Own", float32_bytes=0)
    assert FileRecord.from_properties(record.to_properties()) == record
    with pytest.raises(ValueError, match=r"metadata vocabulary \(None\) must be of type str"):
        record.require("vocabulary", str)


@given(st.sampled_from(sorted(ARRAY_KINDS)), st.lists(st.integers(0, 3), max_size=3))
def test_arrays_of_every_kind_come_back(kind: str, shape: list[int]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
    found = decode_array(json.loads(json.dumps(encode_array(values, kind))), (kind,))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    with pytest.raises(ValueError, match=r"array \(.*\) must have a shape and other_base64"):
        decode_array(encode_array(values, kind), ("other",))


def test_a_reference_of_a_module_is_compared_by_name() -> None:
    inputs = {"x": np.ones(3, np.float32)}
    outputs = {"y": np.array([1.0, -np.inf], np.float32), "choice": np.array([1, 2])}
    reference = ModuleReference(inputs, outputs)
    read = ModuleReference.from_metadata(json.loads(json.dumps(reference.to_metadata())))
    assert read.by_torch
    same = read.parity(outputs)
    assert (same.max_relative_difference, same.num_unequal, same.num_values) == (0.0, 0, 4)
    other = read.parity({"y": np.array([1.5, -np.inf], np.float32), "choice": np.array([1, 3])})
    assert (other.max_relative_difference, other.num_unequal) == (0.5, 1)
    assert not other.agrees(1.0)
    assert read.parity(outputs | {"y": np.array([1.0, 0.0], np.float32)}).max_relative_difference == np.inf
    with pytest.raises(ValueError, match=r"outputs \(y\) must be those expected \(y, choice\)"):
        read.parity({"y": outputs["y"]})
    with pytest.raises(ValueError, match=r"output y \(float64 \(2,\)\) must be as expected \(float32 \(2,\)\)"):
        read.parity(outputs | {"y": outputs["y"].astype(np.float64)})
