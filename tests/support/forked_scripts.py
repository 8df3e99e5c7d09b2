"""Scripts in processes of their own, forked from one that has imported torch, Lightning and what a run needs.

The imports take several seconds in every new interpreter. The forked process has its own number, streams, folder, signals and
exit code; what it inherits is what the imports left.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

PRELOADED = ["forked_scripts", "killed_run", "lightning_modules.lightning_cli", "lightning_modules.callbacks.claims"]


class Script:
    """Python code that runs as `python script arguments` or `python -c code arguments` would, in this folder.

    It has as many threads as this process. Its output goes to the files `stdout` and `stderr`, in a folder that is deleted
    with this object.
    """

    def __init__(self, script: Path | str, *arguments: str, **environment: str) -> None:
        given = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment = os.environ | given | environment
        self._command = [str(script) if isinstance(script, Path) else "-c", *arguments]
        self._folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = streams = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        for path in streams:
            path.touch()
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=_become, args=(script, self._command, streams, environment))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", environment["PYTHONPATH"])  # for the process that is forked, which this may begin
            self.process.start()

    def wait(self, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self._command} must end within {timeout_s} s: {self.stderr.read_text()}")
        return subprocess.CompletedProcess(
            self._command, self.process.exitcode, self.stdout.read_text(), self.stderr.read_text()
        )


def run_script(script: Path | str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return Script(script, *arguments).wait()


def _become(script: Path | str, command: list[str], streams: tuple[Path, Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    if isinstance(script, Path):
        runpy.run_path(str(script), run_name="__main__")
    else:
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
