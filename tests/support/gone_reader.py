"""A command whose output nobody reads any more, as in `trix why ... | head`."""

import subprocess
import sys
from collections.abc import Sequence


def run_without_reader(code: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run Python code in a process of its own, the arguments in sys.argv[1:], stdout closed: its exit code and stderr."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    return process.wait(60), process.stderr.read()
