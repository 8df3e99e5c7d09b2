"""Run a benchmark case, print its table, and record it in benchmarks/results/<case>.json, with a drawing where it has one.

python benchmarks/run.py                      # list the cases
python benchmarks/run.py char_lm_quality --help
python benchmarks/run.py char_lm_quality --steps 600 --seeds 3
"""

import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_modules.commands.arguments import CommandParser
from lightning_modules.drawings import as_svg
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.machine import cpu_name, git_state, instruction_sets
from trix.whole_file import write_whole

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "lightning", "onnx", "onnxruntime", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one case. What a user can mend is told in one line on stderr, with exit code 2."""
    try:
        return run_case(argv)
    except UserError as error:
        said: object = error
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        said = stop.code
    print(f"run.py: error: {one_line(said)}", file=sys.stderr)
    return 2


def run_case(argv: Sequence[str] | None) -> int:
    sys.path.insert(0, str(HERE))
    names = sorted(path.stem for path in (HERE / "cases").glob("[a-z]*.py"))
    cases = {name: importlib.import_module(f"cases.{name}") for name in names}
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="case", metavar="CASE")
    for name, case in cases.items():
        command = commands.add_parser(
            name,
            help=(case.__doc__ or "").splitlines()[0],
            description=case.__doc__,
        )
        case.add_arguments(command)
        command.add_argument(
            "--output", type=Path, default=HERE / "results" / f"{name}.json", help="where to record (default: %(default)s)"
        )
    arguments = parser.parse_args(argv)
    if arguments.case is None:
        parser.print_help()
        return 2
    options = {key: value for key, value in vars(arguments).items() if key not in ("case", "output")}
    case = cases[arguments.case]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)  # now: a case may run for an hour
    record = {"case": arguments.case, "options": options, "machine": machine(), "results": case.run(**options)}
    print(case.table(record["results"]))
    write_whole((json.dumps(record, indent=1) + "\n").encode(), arguments.output)
    print(f"recorded in {arguments.output}")
    if hasattr(case, "figure"):
        drawing = arguments.output.with_suffix(".svg")
        write_whole(as_svg(case.figure(record["results"])), drawing)
        print(f"drawn in {drawing}")
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on beside the options."""
    return {
        "git": git_state(HERE),
        "cpu": cpu_name(),
        "instruction_sets": instruction_sets(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
