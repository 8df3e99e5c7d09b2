"""The architecture that no type checker sees: who imports whom, what loads light, how long a file is, no pickles."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("trix", "lightning_modules", "ort_ops")
MAX_LINES = 450
PICKLE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def test_import_contracts_of_pyproject_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("ort_ops.library", {"torch", "trix", "onnx", "onnxscript", "lightning"}),
        ("ort_ops.runtime", {"torch", "trix.nn", "onnx", "onnxscript", "lightning"}),
        ("ort_ops.surgery", {"torch", "trix.nn", "onnxscript", "lightning"}),
        ("trix.whole_file", {"torch", "trix.nn", "onnx", "onnxscript", "onnxruntime", "numpy", "lightning"}),
        ("ort_ops.schema", {"torch", "trix", "onnx", "onnxscript", "onnxruntime", "numpy"}),
        ("ort_ops.operators", {"torch", "trix", "onnxscript", "onnxruntime", "lightning"}),
        ("ort_ops.self_test", {"torch", "trix", "onnxscript", "lightning"}),
        ("trix.superposition", {"torch", "pandas", "pydantic", "transformers", "sklearn", "numpy"}),
        ("lightning_modules.cli", {"torch", "lightning", "onnx", "onnxruntime"}),
    ],
)
def test_light_modules_load_nothing_heavy(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert forbidden & set(result.stdout.split()) == set()


def test_files_are_one_room_each() -> None:
    paths = sources(*PACKAGES, "tests", "benchmarks", suffixes=(".py", ".cpp", ".hpp"))
    assert len(paths) > 20
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def unsafe_loads(code: str) -> list[str]:
    """Imports of pickle and its kin, and calls of torch.load that may unpickle, as `line: text`."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            unsafe = any(alias.name.split(".")[0] in PICKLE_MODULES for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            unsafe = module in PICKLE_MODULES
            unsafe |= module == "torch" and any(alias.name == "load" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = name == "torch.load" and given.get("weights_only") != "True"
            unsafe |= name.endswith(".load_from_checkpoint") and given.get("weights_only", "True") != "True"
            unsafe |= given.get("allow_pickle", "False") != "False"
        else:
            continue
        if unsafe:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_packages_load_no_pickles() -> None:
    found = {str(path.relative_to(ROOT)): unsafe_loads(path.read_text()) for path in sources(*PACKAGES)}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "is_unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("from torch import load", True),
        ("import pickle", True),
        ("from joblib import load", True),
        ("Model.load_from_checkpoint(path, weights_only=False)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("onnx.load(path)", False),
    ],
)
def test_the_rule_against_pickles_sees_them(code: str, is_unsafe: bool) -> None:
    assert bool(unsafe_loads(code)) == is_unsafe


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports in functions and for type checkers count, too."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert len(graph.modules) > 100
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()


def test_test_files_have_names_of_their_own() -> None:
    """pytest refuses a second file of the same name, but only once it collects both."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
