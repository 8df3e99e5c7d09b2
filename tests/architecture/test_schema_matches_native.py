"""The Python schema and the tables in the C++ sources say the same."""

import re
from pathlib import Path

import ort_ops
from ort_ops import schema
from trix.functional.gates import Gate

NATIVE_OPS = Path(ort_ops.__file__).parent / "native" / "ops"
DEFAULT_OF = {"std::int64_t": int, "float": float}
ELEMENT_TYPES = {"kFloat": "float32", "kUint8": "uint8", "kInt64": "int64"}


def table(source: str, name: str) -> list[schema.TensorSchema]:
    """The rows of `constexpr TensorSpec <name>[] = {...};`, e.g. {"x", ElementType::kFloat, 2, "[T, K]"}; true: optional."""
    body = re.search(rf"TensorSpec {name}\[\] = \{{(.*?)\n\}};", source, re.DOTALL)
    assert body is not None, name
    rows = re.findall(r'\{"(\w+)", ElementType::(\w+), (\d+), "\[(.*?)\]"(, true)?\}', body[1])
    tensors = [
        schema.TensorSchema(row[0], ELEMENT_TYPES[row[1]], tuple(row[3].split(", ")), bool(row[4]))  # type: ignore[arg-type]
        for row in rows
    ]
    assert [len(tensor.shape) for tensor in tensors] == [int(row[2]) for row in rows]
    return tensors


def native_sources() -> dict[str, str]:
    """Source text by op name; of what ops share, each has what it includes."""
    sources = [with_shared_parts(path.read_text()) for path in sorted(NATIVE_OPS.glob("*_op.cpp"))]
    return {re.search(r'kName = "(\w+)"', source)[1]: source for source in sources}  # type: ignore[index]


def with_shared_parts(source: str) -> str:
    uses_activations = "Activations activations_" in source
    return source + ((NATIVE_OPS / "tile_product.hpp").read_text() if uses_activations else "")


def test_op_names_agree() -> None:
    assert sorted(native_sources()) == sorted(op.name for op in schema.OPS)


def test_inputs_and_outputs_agree() -> None:
    for op in schema.OPS:
        source = native_sources()[op.name]
        assert table(source, "kInputTable") == list(op.inputs)
        assert table(source, "kOutputTable") == list(op.outputs)


def test_attributes_agree() -> None:
    for op in schema.OPS:
        source = native_sources()[op.name]
        names = re.findall(r'k\w+Attribute = "(\w+)"', source)
        defaults = [
            DEFAULT_OF[kind](value) for kind, value in re.findall(r"constexpr ([\w:]+) k\w+Default = (-?[\d.e-]+)", source)
        ]
        assert list(zip(names, defaults, strict=True)) == [(a.name, a.default) for a in op.attributes]
        assert [type(default) for default in defaults] == [
            float if isinstance(a, schema.FloatAttribute) else int for a in op.attributes
        ]


def test_the_codes_of_the_gates_agree() -> None:
    header = (NATIVE_OPS.parent / "kernels" / "signature_gate" / "signature_gate.hpp").read_text()
    body = re.search(r"enum class Gate : std::int64_t \{(.*?)\}", header)
    assert body is not None
    codes = {name.upper(): int(code) for name, code in re.findall(r"k(\w+) = (\d+)", body[1])}
    assert codes == {gate.name: gate.value for gate in Gate}
    assert all(f"{gate.value} {gate.name.lower()}" in schema.SIGNATURE_ROUTE.doc for gate in Gate)


def test_domain_and_version_agree() -> None:
    assert f'kDomainName = "{schema.DOMAIN}"' in (NATIVE_OPS / "register.cpp").read_text()
    custom_op = (NATIVE_OPS / "custom_op.hpp").read_text()
    assert f"GetStartVersion = [](const Base*) {{ return {schema.OPSET_VERSION}; }}" in custom_op
