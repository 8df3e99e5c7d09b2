"""The lists of operators and kernels name the same things in Python, in C++ and in the folders; so do the operators' tables."""

import re
from pathlib import Path

import ort_ops
from ort_ops import schema
from ort_ops.operators import OPERATORS, SCHEMAS
from ort_ops.operators.signature_route import SIGNATURE_ROUTE

NATIVE = Path(ort_ops.__file__).parent / "native"
NATIVE_OPS = NATIVE / "ops"
SUPPORT = Path(__file__).parents[1] / "support"
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


def rows(path: Path, macro: str) -> list[list[str]]:
    """The arguments of each row of a list, e.g. TRIX_OP(sparse_lookup, SparseLookup)."""
    return [row.split(", ") for row in re.findall(rf"^{macro}\((.*)\)$", path.read_text(), re.MULTILINE)]


def test_the_lists_of_operators_agree() -> None:
    in_python = [[file, operator.schema.name] for file, operator in OPERATORS.items()]
    assert rows(NATIVE / "ops" / "ops.inc", "TRIX_OP") == in_python, "OPERATORS and ops.inc must hold the same rows"
    assert sorted(native_sources()) == sorted(op.name for op in SCHEMAS), "each ops/*_op.cpp must have a row in ops.inc"


def test_each_operator_has_its_files() -> None:
    for file, operator in OPERATORS.items():
        places = (
            NATIVE.parent / "operators" / f"{file}.py",
            NATIVE / "ops" / f"{file}_op.cpp",
            SUPPORT / "operator_cases" / f"{file}.py",
        )
        assert [str(path) for path in places if not path.is_file()] == [], f"files of {operator.schema.name}"


def test_each_kernel_has_its_files_and_each_file_its_row() -> None:
    """A forgotten row would leave a variant out of the library, and a forgotten kernel out of the tests."""
    kernels = NATIVE / "kernels"
    listed = {row[0]: row[2:] for row in rows(kernels / "kernels.inc", "TRIX_KERNEL")}
    folders = {path.name for path in kernels.iterdir() if path.is_dir()}
    assert folders == set(listed), "each folder of kernels/ must have a row in kernels.inc, and each row a folder"
    for kernel, sets in listed.items():
        assert sets[-1] == "scalar", f"the row of {kernel} in kernels.inc must end in scalar"
        assert len(set(sets)) == len(sets), f"the row of {kernel} must name an instruction set once"
        found = {path.stem.removeprefix(f"{kernel}_") for path in (kernels / kernel).glob(f"{kernel}_*.cpp")}
        assert found == set(sets), f"the row of {kernel} must name the instruction sets of its files"
        for path in (kernels / kernel / f"{kernel}.hpp", NATIVE / "tests" / f"test_{kernel}.cpp"):
            assert path.is_file(), f"{kernel} must have {path}"


def test_inputs_and_outputs_agree() -> None:
    for op in SCHEMAS:
        source = native_sources()[op.name]
        assert table(source, "kInputTable") == list(op.inputs)
        assert table(source, "kOutputTable") == list(op.outputs)


def test_attributes_agree() -> None:
    for op in SCHEMAS:
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
    from trix.functional.gates import Gate  # here, so that the other tests load no torch

    header = (NATIVE / "kernels" / "signature_gate" / "signature_gate.hpp").read_text()
    body = re.search(r"enum class Gate : std::int64_t \{(.*?)\}", header)
    assert body is not None
    codes = {name.upper(): int(code) for name, code in re.findall(r"k(\w+) = (\d+)", body[1])}
    assert codes == {gate.name: gate.value for gate in Gate}
    assert all(f"{gate.value} {gate.name.lower()}" in SIGNATURE_ROUTE.doc for gate in Gate)


def test_domain_and_version_agree() -> None:
    assert f'kDomainName = "{schema.DOMAIN}"' in (NATIVE_OPS / "register.cpp").read_text()
    custom_op = (NATIVE_OPS / "custom_op.hpp").read_text()
    assert f"GetStartVersion = [](const Base*) {{ return {schema.OPSET_VERSION}; }}" in custom_op
