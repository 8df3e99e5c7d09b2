"""What goes wrong around a run, caused for real: one clear line, the right exit code, and the checkpoints as they were."""

import ctypes
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pooch
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from forked_scripts import Script, run_script

from lightning_modules.cli import main
from lightning_modules.data import corpora
from lightning_modules.data.corpora import RemoteFile
from lightning_modules.tasks import RoutedTask, load_checkpoint, read_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
RUN = "runs/small"
FIT = ["fit", "--config", "small.yaml"]
NORM = "network.norm.weight"
NETWORK = {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8, "ffn": {"num_tiles": 4}}
STOP_AT_SPIKES = {"class_path": "StabilityMonitor", "init_args": {"spike_factor": 1.01, "on_spike": "stop"}}
NO_CHECKPOINT = r"is not a checkpoint that can be loaded safely \(or it is cut short\)"
CONFIG = {
    "model": {"class_path": "LanguageModelTask", "init_args": {"network": NETWORK}},
    "data": {
        "class_path": "TextDataModule",
        "init_args": {"path": "text.txt", "context_length": 8, "batch_size": 4, "batches_per_epoch": 20},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 12,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "small", "version": 0}},
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}}],
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return tmp_path


def checkpoints() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("runs").rglob("*.ckpt")}


def assert_sound(paths: dict[str, bytes]) -> None:
    assert {Path(path).name for path in paths} == {"best.ckpt", "last.ckpt"}
    for path in paths:
        task, _ = load_checkpoint(path)
        assert all(parameter.isfinite().all() for parameter in task.parameters())


class Fault:
    """Break the training step that follows `step` steps, and keep what the checkpoints are then."""

    def __init__(self, kind: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.step, self.is_on = kind, step, True
        self.checkpoints: dict[str, bytes] = {}
        training_step = RoutedTask.training_step

        def broken(task: RoutedTask, batch: Any) -> Any:
            if not self.is_on or task.global_step != self.step:
                return training_step(task, batch)
            self.checkpoints = checkpoints()
            parameter = task.get_parameter(NORM)
            if self.kind == "weight":
                parameter.data[0] = math.nan
            elif self.kind == "gradient":
                parameter.register_hook(lambda gradient: gradient * math.inf)
            output = training_step(task, batch)
            if self.kind == "loss":
                output["loss"] = output["loss"] * math.nan
            return output

        monkeypatch.setattr(RoutedTask, "training_step", broken)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("loss", r"the loss of step 9 \(nan\) must be finite: train/loss \d\S+, train/aux_loss \d\S+"),
        (
            "weight",
            rf"the loss of step 9 \(nan\) must be finite: train/loss nan, train/aux\S+ \S+, with {NORM} not finite either",
        ),
        ("gradient", rf"the gradient of step 9 must be finite: it is not in {NORM}"),
    ],
)
def test_a_number_that_is_not_finite_ends_the_run_before_it_does_harm(
    kind: str, problem: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = Fault(kind, 8, monkeypatch)
    assert main(FIT) == 2
    remedy = r"lower model.optimizer.lr \(now 0.000\d+\) or lower trainer.gradient_clip_val \(1.0\)"
    line = rf"trix: error: {problem}; {remedy}; the last good checkpoint is runs/small/\S*last.ckpt\n"
    err = capfd.readouterr().err
    assert re.fullmatch(line, err), err
    assert_sound(fault.checkpoints)
    assert checkpoints() == fault.checkpoints

    fault.is_on = False
    assert main(["fit", "--resume", RUN]) == 0
    assert "going on after step 6" in capfd.readouterr().out


def test_a_learning_rate_that_is_far_too_high_gives_no_checkpoint(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--model.optimizer.lr=1e20"]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"trix: error: the gradient of step 2 must be .*; no checkpoint has been written\n", err), err
    assert checkpoints() == {}


def test_a_step_beyond_the_range_of_floats_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--model.optimizer.lr=1e38"]) == 2  # torch refuses to take it
    err = capfd.readouterr().err
    assert err.startswith("trix: error: the optimizer's step 1 must be finite: lower model.optimizer.lr (now 1e+38) or ")
    assert err.count("\n") == 1
    assert checkpoints() == {}


def test_a_monitor_of_ones_own_takes_the_place_of_the_first(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = {"trainer": {"callbacks+": [STOP_AT_SPIKES]}}
    Path("stop.yaml").write_text(yaml.safe_dump(config))
    assert main([*FIT, "--config", "stop.yaml", "--trainer.max_steps=60", "--model.optimizer.lr=0.3"]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"trix: error: the gradient norm of step \d+ \(\S+\) must be <= spike_factor \(1.01\) .*\n", err), err
    assert_sound(checkpoints())


def full_disk_is_possible() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return sys.platform == "linux" and shutil.which("unshare") is not None and subprocess.run(command).returncode == 0


@pytest.mark.skipif(not full_disk_is_possible(), reason="needs a file system of its own, which this machine does not allow")
def test_a_full_disk(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.max_steps=3"]) == 0
    size = max(len(content) for content in checkpoints().values())
    shutil.rmtree("runs")
    Path("runs").mkdir()
    # Room for the logs and best.ckpt; not for last.ckpt, of the same size.
    script = f'mount -t tmpfs -o size={size // 1024 * 3 // 2}k none runs && "$@"; code=$?; cp -r runs left; exit $code'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    command += [sys.executable, "-m", "lightning_modules.cli", *FIT]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert re.fullmatch(r"trix: error: runs/small/\S*last.ckpt: No space left on device\n", result.stderr)
    assert result.returncode == 2
    files = [path for path in Path("left").rglob("*") if path.suffix in (".ckpt", ".partial")]
    assert [path.name for path in files] == ["best.ckpt"]
    load_checkpoint(files[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_cannot_be_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = Path("runs/small/version_0")
    logs.mkdir(parents=True)
    (logs / "metrics.csv").symlink_to("/dev/full")
    assert main(FIT) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"trix: error: runs/small/version_0/metrics.csv: No space left on device\n", err), err


def test_a_folder_that_may_only_be_read(folder: Path) -> None:
    assert main(FIT) == 0
    before = checkpoints()
    for path in [Path("runs"), *Path("runs").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-m", "lightning_modules.cli", *FIT, "--trainer.logger.init_args.version=1"]
    try:
        result = subprocess.run(command, env=ENVIRONMENT, preexec_fn=keep_to_permissions, capture_output=True, text=True)
    finally:
        for path in [Path("runs"), *Path("runs").rglob("*")]:
            path.chmod(0o755)
    assert re.fullmatch(r"trix: error: runs/small/version_1: Permission denied\n", result.stderr), result.stderr
    assert result.returncode == 2
    assert checkpoints() == before


def keep_to_permissions() -> None:
    """Root may write anywhere, unless the program that it starts lacks the capability to."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_file_in_place_of_the_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("not a folder")
    assert main(FIT) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"trix: error: runs\S*: (Not a directory|File exists)\n", err), err
    assert Path("runs").read_text() == "not a folder"


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_byte_changed(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def web_page(_: bytes) -> bytes:
    return b"<html>404</html>"


def foreign(content: bytes) -> bytes:
    torch.save({"state_dict": {"weight": torch.ones(2)}}, "foreign.pt")
    return Path("foreign.pt").read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut_short, NO_CHECKPOINT),
        (one_byte_changed, r"is damaged: the checksum of its part \S+ is wrong"),
        (web_page, NO_CHECKPOINT),
        (foreign, "was not written by `trix fit`: it has no entry 'trix'"),
    ],
)
def test_a_checkpoint_that_is_none(
    change: Callable[[bytes], bytes], problem: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--trainer.max_steps=3"]) == 0
    good = next(path for path in Path("runs").rglob("best.ckpt"))
    Path("bad.ckpt").write_bytes(change(good.read_bytes()))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capfd.readouterr()
    for arguments in (
        [*FIT, "--ckpt_path=bad.ckpt"],
        ["fit", "--resume", "bad.ckpt", "--config", "small.yaml"],
        ["validate", "--config", "small.yaml", "--ckpt_path=bad.ckpt"],
        ["inspect", "bad.ckpt"],
        ["why", "bad.ckpt", "--prompt", "The "],
        ["export", "--ckpt", "bad.ckpt", "--output", "model.onnx"],
    ):
        assert main(arguments) == 2, arguments
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(f"trix: error: bad.ckpt {problem}\n", err), (arguments, err)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("moment", ["step", "checkpoint"])
def test_ctrl_c_leaves_the_checkpoints_and_a_run_that_goes_on(
    moment: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_script(SUPPORT / "interrupted_run.py", "8" if moment == "step" else "9", moment, *FIT)
    assert result.stderr == "trix: interrupted\n"
    assert result.returncode == 130
    interrupted = sorted(Path("runs").rglob("interrupted.ckpt"))
    paths = checkpoints()
    assert_sound({path: content for path, content in paths.items() if Path(path).name != "interrupted.ckpt"})
    assert not list(Path("runs").rglob("*.partial"))
    assert main(["fit", "--resume", RUN]) == 0
    assert "training     12 steps on cpu, going on after step 6\n" in capfd.readouterr().out
    if moment == "step":
        step = read_checkpoint(interrupted[0])["global_step"]
        assert step in (7, 8)
        assert main(["fit", "--resume", str(interrupted[0])]) == 0
        assert f"training     12 steps on cpu, going on after step {step}\n" in capfd.readouterr().out


CONTENT = b"It was a bright cold day in April, and the clocks were striking thirteen.\n" * 200


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serves CONTENT: whole, or its first half, after which it hangs up or waits; and an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        mode = "whole"
        has_sent = Event()
        may_end = Event()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if Handler.mode == "whole" else CONTENT[: len(CONTENT) // 2])
            self.wfile.flush()
            Handler.has_sent.set()
            if Handler.mode == "waits":
                Handler.may_end.wait(60)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(corpora.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{http.server_port}/input.txt"
        file = RemoteFile("april.txt", address, hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(corpora, "TINYSHAKESPEARE", file)
        yield Handler
        Handler.may_end.set()
        http.shutdown()
        thread.join()


CORPUS = [*FIT, "--data.path=null", "--data.corpus=tinyshakespeare", "--trainer.max_steps=3"]


def test_a_download_that_breaks_off_is_told_and_not_kept(server: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.mode = "half"
    assert main(CORPUS) == 2
    err = capfd.readouterr().err.splitlines()[-1]  # after pooch's bar
    assert re.search(r"trix: error: downloading http\S+ failed \(\S+: .*; with the file at hand, save it as april.txt", err), (
        err
    )
    assert [path for path in Path("cache").rglob("*") if path.is_file()] == []
    assert not Path("runs").exists()
    server.mode = "whole"
    assert main(CORPUS) == 0
    assert [path.name for path in Path("cache").rglob("*") if path.is_file()] == ["april.txt"]


def test_a_download_that_is_killed_is_made_again(server: Any, folder: Path) -> None:
    server.mode = "waits"
    file = corpora.TINYSHAKESPEARE
    code = (
        "import pooch, sys; from pathlib import Path; from lightning_modules.data.corpora import RemoteFile, fetch; "
        "pooch.os_cache = lambda project: Path('cache') / project; fetch(RemoteFile(*sys.argv[1:]))"
    )
    script = Script(code, file.name, file.url, file.sha256)
    has_sent = server.has_sent.wait(60)
    deadline = time.monotonic() + 60
    while not any(path.is_file() for path in Path("cache").rglob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    script.process.kill()
    assert has_sent
    assert script.wait().returncode == -signal.SIGKILL
    assert not Path("cache/trix/april.txt").exists()
    server.mode = "whole"
    assert corpora.fetch(file).read_bytes() == CONTENT
    assert [path.name for path in Path("cache").rglob("*") if path.is_file()] == ["april.txt"]
