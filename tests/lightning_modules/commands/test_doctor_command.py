"""``trix doctor``: what it finds is so; each thing that can be wrong is called a problem and gives exit code 2."""

import subprocess
import sys
from importlib import metadata

import pytest

from lightning_modules.cli import main
from lightning_modules.commands import doctor
from lightning_modules.commands.doctor import Finding, optional_packages, read_self_test, required_packages
from ort_ops.library import get_library_path

REQUIREMENTS = ["one>=1.5", "two<3", "three>=1; python_version < '3'", 'four>=1; extra == "data"', 'trix[data]; extra == "dev"']


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the packages' metadata say: a dictionary to fill."""
    versions = {"trix": "0.1.0", "one": "1.5", "two": "2.9"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    class Extras:
        def get_all(self, _: str) -> list[str]:
            return ["data"]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIREMENTS)
    monkeypatch.setattr(metadata, "metadata", lambda _: Extras())
    return versions


def test_all_is_well_here(native_library: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIX_ORT_ISA", "scalar")
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    for name in ("torch", "lightning", "onnx", "onnxruntime", "rich"):
        assert [name, metadata.version(name)] in lines
    assert ["TRIX_ORT_ISA", "scalar"] in lines
    assert f"  native            kernels for scalar: self-test passed ({get_library_path()})\n" in out
    assert "  portable          standard ONNX operators: self-test passed\n" in out
    assert out.endswith("all that is required works\n")
    columns = {line.index(line.split(maxsplit=1)[1]) for line in out.splitlines() if line.startswith("  python ")}
    assert columns == {20}


def test_a_problem_gives_exit_code_2(
    native_library: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIX_ORT_ISA", "mmx")
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "  native            PROBLEM  onnxruntime can't use the native operators: " in out
    assert "TRIX_ORT_ISA (mmx) must be one of: scalar, avx2, avx512_vnni, neon, neon_dotprod\n" in out
    assert out.endswith("problems: native\n")


def test_packages_that_fit(installed: dict[str, str]) -> None:
    assert [(finding.name, finding.text) for finding in required_packages()[1:]] == [("one", "1.5"), ("two", "2.9")]
    assert required_packages()[0].text.startswith("0.1.0 (")
    assert not any(finding.is_problem for finding in required_packages())


def test_a_package_that_is_missing_or_does_not_fit(installed: dict[str, str]) -> None:
    del installed["one"]
    installed["two"] = "3.0"
    expected = [
        Finding("one", f"missing: {doctor.INSTALL}", is_problem=True),
        Finding("two", f"3.0 must be <3: {doctor.INSTALL}", is_problem=True),
    ]
    assert required_packages()[1:] == expected


def test_trix_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    monkeypatch.setattr(metadata, "requires", fail)
    assert required_packages() == [Finding("trix", f"not installed: {doctor.INSTALL}", is_problem=True)]
    assert optional_packages() == []


def test_an_extra_that_is_missing_is_no_problem(installed: dict[str, str]) -> None:
    (lacking,) = optional_packages()
    assert lacking == Finding("data", "lacks four>=1: pip install -e '.[data]' in the source tree")
    installed["four"] = "1.0"
    (complete,) = optional_packages()
    assert complete == Finding("data", "four")


SELF_TESTS = [
    ((0, "native missing: none found\nportable ok: x\n", ""), [("none found", False), ("x: self-test passed", False)]),
    ((0, "native wrong: 1 must be 2\nportable ok: x\n", ""), [("1 must be 2", True), ("x: self-test passed", False)]),
    ((0, "native ok: lib\n", ""), [("kernels for an unknown instruction set: self-test passed (lib)", False)]),
    ((-4, "", "some log"), [("self-test failed: its process was ended by SIGILL", True)]),
    ((1, "", "Traceback\nModuleNotFoundError: no onnx\n"), [("self-test failed: ModuleNotFoundError: no onnx", True)]),
    ((1, "native missing: y\n", ""), [("y", False), ("self-test failed: no message", True)]),
]


@pytest.mark.parametrize(("result", "expected"), SELF_TESTS)
def test_what_the_self_test_says_is_understood(result: tuple[int, str, str], expected: list[tuple[str, bool]]) -> None:
    assert [(finding.text, finding.is_problem) for finding in read_self_test(*result)] == expected


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "main(['doctor'])\n"
        "heavy = [name for name in ('torch', 'lightning', 'onnx', 'onnxruntime', 'numpy') if name in sys.modules]\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_mistake_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 2
    assert capsys.readouterr().err == "trix: error: unknown option --json of `trix doctor`\n"
