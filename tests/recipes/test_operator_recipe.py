"""The recipes for a kernel and for an operator, carried out as they are written: in a copy of the sources, block by block."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from native_builds import generator, run, tool
from recipe_blocks import apply, blocks, section

from ort_ops.library import LIBRARY_NAME

ROOT = Path(__file__).parents[2]
MAX_EDITED = 2
CONSISTENCY = "tests/architecture/test_schema_matches_native.py"
# Where each recipe stands, and the files that it edits. The operator calls the kernel.
RECIPES = [
    ("ort_ops/native/kernels/README.md", "A new kernel", {"ort_ops/native/kernels/kernels.inc"}),
    ("docs/how-to/own-operator.md", "Write your own operator", {"ort_ops/native/ops/ops.inc", "ort_ops/operators/__init__.py"}),
]
BOTH_PATHS = """
import numpy as np
from packed_models import make_model, native_session, portable_session
from operator_cases.scaled_add import valid_case
from ort_ops.operators import OPERATORS

for seed in range(20):
    inputs, attributes = valid_case(np.random.default_rng(seed))
    model = make_model(OPERATORS["scaled_add"].schema, with_functions=True, **attributes)
    (native,), (portable,) = (session(model).run(None, inputs) for session in (native_session, portable_session))
    np.testing.assert_array_equal(native, portable)
    np.testing.assert_allclose(native, inputs["x"] + attributes["scale"] * inputs["z"], rtol=1e-5, atol=1e-6)
bare = make_model(OPERATORS["scaled_add"].schema)
try:
    native_session(bare).run(None, {"x": inputs["x"], "z": inputs["z"][:, 1:]})
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources that the recipes name, and the tests that hold for every operator and kernel."""
    root = tmp_path_factory.mktemp("recipes")
    for folder in ("ort_ops", "tests/support", "tests/architecture"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", LIBRARY_NAME))
    return root


@pytest.fixture(scope="module")
def built(copy: Path, cxx_compiler: str) -> Path:
    """The copy after both recipes, with its library. Compiled quickly, not for speed; the kernel tests of one kernel."""
    for text, title in (
        (ROOT / "ort_ops/native/kernels/README.md", "A new kernel"),
        (ROOT / "docs/how-to/own-operator.md", "Write your own operator"),
    ):
        apply(blocks(section(text.read_text(), title)), copy)
    build = copy / "build"
    quick = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0", "-DTRIX_BUILD_TESTS=ON")
    run(tool("cmake"), "-S", copy / "ort_ops" / "native", "-B", build, *generator(), *quick)
    run(tool("cmake"), "--build", build, "--parallel", "2")
    shutil.copy(build / LIBRARY_NAME, copy / "ort_ops")
    return copy


def python(root: Path, *arguments: str) -> str:
    """Python on the packages of the copy. -S: without the hook of an editable installation. -P: nor the working folder."""
    others = [path for path in sys.path if path and Path(path).name not in ("support", "recipes")]
    path = os.pathsep.join([str(root), str(root / "tests" / "support"), *others])
    return run(sys.executable, "-S", "-P", *arguments, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")


@pytest.mark.parametrize(("text", "title", "edited"), RECIPES)
def test_a_recipe_adds_files_and_edits_at_most_two(text: str, title: str, edited: set[str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ort_ops", tmp_path / "ort_ops", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    recipe = section((ROOT / text).read_text(), title)
    steps = blocks(recipe)
    assert len(steps) == recipe.count("\n```\n"), "every block of the recipe must have a path"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    added, changed = apply(steps, tmp_path)
    assert changed == edited
    assert len(changed) <= MAX_EDITED
    assert {path for path, content in before.items() if path.read_bytes() != content} == {tmp_path / path for path in edited}
    assert len(added) == len(steps) - len(edited)


def test_the_kernel_of_the_recipe_passes_its_test(built: Path) -> None:
    output = run(built / "build" / "kernel_tests", "scaled_add")
    assert "ran scaled_add_scalar\n" in output
    assert output.endswith("\n0 failures\n")


def test_the_operator_of_the_recipe_runs_natively_and_by_its_function(built: Path) -> None:
    output = python(built, "-c", BOTH_PATHS)
    assert re.search(r"ScaledAdd: shape of z \[\d+, \d+\] must be that of x \[\d+, \d+\]", output), output


def test_the_self_test_checks_the_operator_of_the_recipe(built: Path) -> None:
    output = python(built, "-m", "ort_ops.self_test")
    assert f"native ok: {built / 'ort_ops' / LIBRARY_NAME}\nportable ok: " in output
    spoiled = "from ort_ops.operators import scaled_add, OPERATORS; from ort_ops import self_test\n"
    spoiled += "scaled_add.relative_error = lambda found, expected: 1.0; print(self_test.check('portable'))"
    assert "relative error of ScaledAdd (1.0e+00) must be <= " in python(built, "-c", spoiled)


def test_the_lists_and_tables_agree_after_the_recipes(built: Path) -> None:
    assert_consistent(built)


def assert_consistent(root: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={root}")
    python(root, "-m", "pytest", *options, "-k", "not gates", str(root / CONSISTENCY))  # that test loads torch


@pytest.mark.parametrize(
    ("path", "row", "message"),
    [
        ("ort_ops/native/ops/ops.inc", "TRIX_OP(scaled_add, ScaledAdd)\n", "OPERATORS and ops.inc must hold the same rows"),
        ("ort_ops/operators/__init__.py", '    "scaled_add",\n', "OPERATORS and ops.inc must hold the same rows"),
        (
            "ort_ops/native/kernels/kernels.inc",
            "TRIX_KERNEL(scaled_add, ScaledAdd, avx2, scalar)\n",
            "each folder of kernels/ must have a row in kernels.inc",
        ),
    ],
)
def test_a_forgotten_row_is_named(built: Path, path: str, row: str, message: str) -> None:
    complete = (built / path).read_text()
    assert row in complete
    try:
        (built / path).write_text(complete.replace(row, ""))
        with pytest.raises(AssertionError, match=re.escape(message)):
            assert_consistent(built)
    finally:
        (built / path).write_text(complete)
