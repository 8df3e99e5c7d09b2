"""Two processes on a CPU: the run of one process with the same batches, a resume, and what is said once."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from forked_scripts import Script

from lightning_modules import cli
from lightning_modules.callbacks.run_record import read_metrics
from lightning_modules.cli import main

SUPPORT = Path(__file__).parents[1] / "support"
TWO_PROCESSES = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # 23 validation windows of 8 characters: the processes have unequal parts.
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog; 0123456789 times.\n" * 30)
    network = {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8, "ffn": {"num_tiles": 4}}
    data = {"path": "text.txt", "context_length": 8, "batch_size": 8, "batches_per_epoch": 7}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}},
        {"class_path": "DiversityMonitor", "init_args": {"threshold": 1.0, "every_n_steps": 1}},
        {"class_path": "RoutingMonitor", "init_args": {"figures": False}},
        {"class_path": "ClaimMonitor"},
    ]
    trainer = {"accelerator": "cpu", "max_steps": 12, "val_check_interval": 6, "check_val_every_n_epoch": None}
    trainer |= {"log_every_n_steps": 1, "callbacks": callbacks}
    content = {
        "model": {"class_path": "LanguageModelTask", "init_args": {"network": network}},
        "data": {"class_path": "TextDataModule", "init_args": data},
        "trainer": trainer,
    }
    Path("small.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def launch_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: it starts the second process itself."""
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_modules.cli", *arguments, *TWO_PROCESSES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result


def run_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start both processes as torchrun would, and return what the first one says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [{"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in "01"]
    scripts = [Script(Path(cli.__file__), *arguments, *TWO_PROCESSES, **rank) for rank in ranks]
    results = [script.wait() for script in scripts]
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    return results[0]


def weights(version: int) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(f"lightning_logs/version_{version}/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    return checkpoint["state_dict"]


def tokens_counted(version: int) -> torch.Tensor:
    """By tile of the first layer, since Evolution last looked at it."""
    checkpoint = torch.load(f"lightning_logs/version_{version}/checkpoints/last.ckpt", weights_only=True)
    count_E: torch.Tensor = checkpoint["callbacks"]["Evolution"]["statistics"]["layer_0"]["count_E"]
    return count_E


def test_two_processes_train_as_one_with_their_batches_together(folder: Path) -> None:
    result = launch_two("fit", "--config", "small.yaml", "--data.batch_size=4")
    assert main(["fit", "--config", "small.yaml"]) == 0
    rows = [read_metrics(Path(f"lightning_logs/version_{version}/metrics.csv")) for version in (0, 1)]
    names = {name for row in rows[1] for name in row}
    assert {"train/loss", "train/aux_loss", "val/loss", "claims/layer_1/mean_purity", "routing/layer_0/balance"} <= names
    assert len(rows[0]) == len(rows[1])
    for two, one in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    one, two = weights(1), weights(0)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    # Each is said by the first process alone; and a page is drawn, of which the others know nothing.
    warnings = [line for line in result.stderr.splitlines() if "signature diversity" in line]
    assert len(warnings) == 2  # one a layer
    assert "trix: warning: report.html" not in result.stderr
    assert result.stdout.count("checkpoint   ") == result.stdout.count("report       ") == 1
    assert Path("lightning_logs/version_0/report.html").is_file()


SPOIL = """
import lightning as L


class SpoilOne(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            next(pl_module.parameters()).grad.fill_(float("nan"))
"""


def test_where_a_step_fails_in_one_process_both_leave_it_out(folder: Path) -> None:
    Path("spoil.py").write_text(SPOIL)
    changes = ["--trainer.callbacks+=AutoRecovery", "--trainer.callbacks+=spoil.SpoilOne", "--report.num_tokens=0"]
    result = run_two("fit", "--config", "small.yaml", *changes)
    assert result.stderr.count("step 6 must go well in every process: its batch is left out") == 1  # what the first one says
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 11
    assert checkpoint["callbacks"]["AutoRecovery"]["num_recoveries"] == 1


def test_each_process_gets_its_own_random_numbers_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = ["--model.network.dropout=0.3", "--trainer.callbacks+=uneven_draws.UnevenDraws", "--report.num_tokens=0"]
    run_two("fit", "--config", "small.yaml", *changes, "--trainer.callbacks+=Evolution")  # which acts at step 100
    checkpoint = "lightning_logs/version_0/checkpoints/step=8.ckpt"
    run_two("fit", "--resume", checkpoint, "--trust=uneven_draws")
    expected, resumed = weights(0), weights(1)
    assert [name for name, value in expected.items() if not torch.equal(value, resumed[name])] == []
    counts = [tokens_counted(version) for version in (0, 1)]
    assert counts[0].sum() == 12 * 2 * 8 * 8  # steps, processes, windows, characters
    assert counts[1].tolist() == counts[0].tolist()

    capfd.readouterr()
    options = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    assert main(["fit", "--config", "small.yaml", "--model.network.dropout=0.3", "--resume", checkpoint, *options]) == 0
    assert (
        "number of processes (1) differs from the checkpoint's (2): the run goes on with other random numbers and other batches"
    ) in capfd.readouterr().err
