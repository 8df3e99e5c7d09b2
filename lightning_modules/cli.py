"""The ``trix`` command. Light: help and the deployment commands never import torch."""

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lightning_modules.commands.table import COMMANDS, help_text
from lightning_modules.error_text import did_you_mean, one_line
from lightning_modules.errors import UserError

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
TRACEBACK_VARIABLE = "TRIX_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    What a user can mend is told in one line on stderr, with exit code 2; TRIX_TRACEBACK=1 shows where it came from. An error
    of the program itself keeps its traceback. Ctrl-C gives 130.
    """
    # A closed stdout or stderr is None in Python: what would have gone there is dropped.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (open until the end)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 (open until the end)
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"trix: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except MemoryError:
        print("trix: error: out of memory", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit of its own.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the program itself
            return _output_failed(stop.__context__)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # The reader of the output has gone, as in `trix generate ... | head`: nothing more can be written, also not at exit.
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is not None:  # not what writing to stdout gives
            raise
        return _output_failed(error)


def _output_failed(error: OSError) -> int:
    _drop_output()
    print(f"trix: error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
    return EXIT_USER_ERROR


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> int:
    print("trix: interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def version() -> str:
    try:
        return metadata.version("trix")
    except metadata.PackageNotFoundError:
        return "not installed"


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(help_text(), end="")
        return 0
    if command == "--version":
        print(f"trix {version()}")
        return 0
    # Before torch is loaded: threads that spin while they wait slow each other down many times over on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found = next((row for row in COMMANDS if row.name == command), None)
    if found is not None:
        return found.run(arguments[1:])
    if command.startswith("-"):
        raise UserError(f"the command must come first, got {command}; see `trix --help`")
    hint = did_you_mean(command, [row.name for row in COMMANDS]) or "; see `trix --help`"
    raise UserError(f"unknown command {command!r}{hint}")


if __name__ == "__main__":
    sys.exit(main())
