"""``trix doctor``: what is installed, which kernels this CPU gets, whether they compute what they should, what is missing."""

import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.commands.arguments import CommandParser
from lightning_modules.error_text import one_line
from lightning_modules.machine import instruction_sets, num_usable_cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXIT_PROBLEM = 2
INSTALL = "pip install -e '.[dev]' in the source tree (or make setup)"
SELF_TEST_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """One line of the report: its name, what was found, and whether that is a problem."""

    name: str
    text: str
    is_problem: bool = False

    def __str__(self) -> str:
        return f"  {self.name:<18}{'PROBLEM  ' if self.is_problem else ''}{self.text}"


def run_doctor(arguments: list[str]) -> int:
    """Print the report; 0 where all that is required works, else 2."""
    make_parser().parse_strictly(arguments)
    sections = {
        "system": system(),
        "required": required_packages(),
        "optional": optional_packages(),
        "kernels": kernels(),
    }
    for title, findings in sections.items():
        print(title, *findings, sep="\n")
    problems = [finding.name for findings in sections.values() for finding in findings if finding.is_problem]
    print(f"problems: {', '.join(problems)}" if problems else "all that is required works")
    return EXIT_PROBLEM if problems else 0


def system() -> list[Finding]:
    found = instruction_sets()
    findings = [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("system", f"{platform.system()} {platform.machine()}, {num_usable_cores()} cores to use"),
        Finding("instruction sets", " ".join(found) if found else f"unknown: {platform.system()} has no /proc/cpuinfo"),
    ]
    for name in ("TRIX_ORT_ISA", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            findings.append(Finding(name, os.environ[name]))
    return findings


def required_packages() -> list[Finding]:
    """trix and each package that it cannot do without, with the versions that it takes; none of them is imported."""
    try:
        own, requirements = metadata.version("trix"), _requirements()
    except metadata.PackageNotFoundError:
        return [Finding("trix", f"not installed: {INSTALL}", is_problem=True)]
    except ModuleNotFoundError as error:
        return [Finding(f"{error.name}", f"missing: {INSTALL}", is_problem=True)]
    findings = [Finding("trix", f"{own} ({Path(__file__).parents[2]})")]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version, fits = _installed(requirement)
            if version is None:
                text = f"missing: {INSTALL}"
            else:
                text = version if fits else f"{version} must be {requirement.specifier}: {INSTALL}"
            findings.append(Finding(requirement.name, text, is_problem=not fits))
    return findings


def optional_packages() -> list[Finding]:
    """Each extra: what it holds, or what of it is lacking."""
    try:
        requirements, extras = _requirements(), metadata.metadata("trix").get_all("Provides-Extra") or []
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        return []  # told by required_packages
    findings = []
    for extra in extras:
        own = [
            requirement
            for requirement in requirements
            if requirement.name != "trix"
            and requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        ]
        lacking = [f"{requirement.name}{requirement.specifier}" for requirement in own if not _installed(requirement)[1]]
        names = ", ".join(requirement.name for requirement in own)
        text = f"lacks {', '.join(lacking)}: pip install -e '.[{extra}]' in the source tree" if lacking else names
        findings.append(Finding(extra, text))
    return findings


def _requirements() -> "list[Requirement]":
    """Those of the installed trix, with those of its extras."""
    from packaging.requirements import Requirement

    return [Requirement(text) for text in metadata.requires("trix") or []]


def _installed(requirement: "Requirement") -> tuple[str | None, bool]:
    """The version that is installed, and whether it is one that will do."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None, False
    return version, requirement.specifier.contains(version, prereleases=True)


def kernels() -> list[Finding]:
    """The library, and what both paths answer to the self-test, which runs in a process of its own."""
    # -P and the path: the modules that this process would import, and none from the folder that it happens to stand in.
    command = [sys.executable, "-P", "-m", "ort_ops.self_test"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        tested = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=SELF_TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding("self-test", f"must end within {SELF_TEST_SECONDS} s, still running", is_problem=True)]
    return read_self_test(tested.returncode, tested.stdout, tested.stderr)


def read_self_test(code: int, out: str, err: str) -> list[Finding]:
    """What the self-test said; where it ended early, why."""
    answers = dict(line.split(" ", 1) for line in out.splitlines() if line.startswith(("native ", "portable ")))
    findings = [_answer(path, answers[path], err) for path in ("native", "portable") if path in answers]
    if code != 0:
        last = err.strip().splitlines()[-1] if err.strip() else "no message"
        why = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else last
        untested = next((path for path in ("native", "portable") if path not in answers), "portable")
        findings.append(Finding(untested, one_line(f"self-test failed: {why}"), is_problem=True))
    return findings


def _answer(path: str, answer: str, err: str) -> Finding:
    status, _, why = answer.partition(": ")
    if status == "missing":  # models run without it, slower
        return Finding(path, why)
    if status != "ok":
        return Finding(path, one_line(why), is_problem=True)
    if path == "portable":
        return Finding(path, f"{why}: self-test passed")
    chosen = re.search(r"kernels run with instruction set (\w+)", err)
    return Finding(path, f"kernels for {chosen[1] if chosen else 'an unknown instruction set'}: self-test passed ({why})")


def make_parser() -> CommandParser:
    return CommandParser(
        prog="trix doctor",
        description="Print what is installed and what is missing, which kernels this CPU gets, and whether they compute what\n"
        "they should. Exit code 0 where all that is required works, else 2.",
        epilog="examples:\n  trix doctor\n  TRIX_ORT_ISA=scalar trix doctor",
    )
