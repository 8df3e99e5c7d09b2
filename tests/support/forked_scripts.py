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


def run_script(script: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python script as `python script arguments` would, in this folder and with as many threads."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if "forkserver" not in multiprocessing.get_all_start_methods():
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = context.Process(target=_become, args=(script, arguments, streams, environment))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", environment["PYTHONPATH"])  # for the process that is forked, which this may begin
            process.start()
        process.join()
        stdout, stderr = (stream.read_text() if stream.exists() else "" for stream in streams)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, stdout, stderr)


def _become(script: Path, arguments: tuple[str, ...], streams: tuple[Path, Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
