"""Run a benchmark case, print its table, and record it in benchmarks/results/<case>.json, with a drawing where it has one.

python benchmarks/run.py                      # list the cases
python benchmarks/run.py char_lm_quality --help
python benchmarks/run.py char_lm_quality --steps 600 --seeds 3
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "lightning", "onnx", "onnxruntime", "numpy")


def main() -> int:
    sys.path.insert(0, str(HERE))
    names = sorted(path.stem for path in (HERE / "cases").glob("[a-z]*.py"))
    cases = {name: importlib.import_module(f"cases.{name}") for name in names}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="case", metavar="CASE")
    for name, case in cases.items():
        command = commands.add_parser(
            name,
            help=(case.__doc__ or "").splitlines()[0],
            description=case.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        case.add_arguments(command)
        command.add_argument(
            "--output", type=Path, default=HERE / "results" / f"{name}.json", help="where to record (default: %(default)s)"
        )
    arguments = parser.parse_args()
    if arguments.case is None:
        parser.print_help()
        return 2
    options = {key: value for key, value in vars(arguments).items() if key not in ("case", "output")}
    case = cases[arguments.case]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)  # now: a case may run for an hour
    record = {"case": arguments.case, "options": options, "machine": machine(), "results": case.run(**options)}
    print(case.table(record["results"]))
    write_json(arguments.output, record)
    print(f"recorded in {arguments.output}")
    if hasattr(case, "figure"):
        write_figure(arguments.output.with_suffix(".svg"), case.figure(record["results"]))
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on beside the options."""
    return {
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "cpu": _cpu_name(),
        "instruction_sets": _instruction_sets(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_figure(path: Path, figure: "Figure") -> None:
    """A case's drawing of its results, beside them; whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)
    print(f"drawn in {path}")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _instruction_sets() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"})


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
