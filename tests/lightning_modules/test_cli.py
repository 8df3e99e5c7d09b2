"""The command line: what it answers, and that a mistake gives one line, exit code 2 and nothing left behind."""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked_scripts import Script

from lightning_modules.cli import main
from lightning_modules.commands.table import COMMANDS
from lightning_modules.lightning_cli import fit_settings
from trix.nn import LanguageModelConfig

SMALL = """\
model:
  class_path: LanguageModelTask
  init_args:
    network: {d_model: 16, num_layers: 2, n_heads: 2, context_length: 8, ffn: {num_tiles: 4}}
data:
  class_path: TextDataModule
  init_args: {path: text.txt, context_length: 8, batch_size: 4, batches_per_epoch: 6}
trainer:
  accelerator: cpu
  max_steps: 6
  val_check_interval: 3
  num_sanity_val_steps: 0
  logger:
    class_path: TensorBoardLogger
    init_args: {save_dir: runs, name: small, default_hp_metric: false}
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: best, monitor: val/loss}
"""
CHECKPOINTS = "runs/small/version_0/checkpoints"
BEST, LAST = f"{CHECKPOINTS}/best.ckpt", f"{CHECKPOINTS}/last.ckpt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_top_help_and_version_are_light() -> None:
    code = (
        "import sys; from lightning_modules.cli import main; assert main(['--help']) == 0; assert main([]) == 0; "
        "assert main(['--version']) == 0; assert main(['fitt']) == 2; "
        "print([name for name in ('torch', 'lightning', 'numpy', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"\n  {command.name} " in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stderr == "trix: error: unknown command 'fitt'; did you mean fit?\n"


def test_fit_then_validate_then_predict_then_resume(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("network      6.8 K parameters, 2 routed layers of 4 tiles")
    assert lines[1].startswith("training     6 steps on cpu")
    assert lines[2] == "logs         runs/small/version_0"
    assert lines[3].startswith("step 3 ")
    assert lines[4].startswith("step 6 ")
    assert "val/loss" in lines[4]
    assert lines[5].startswith(f"checkpoint   {BEST} (val/loss ")
    assert lines[6] == "report       runs/small/version_0/report.html"
    assert len(lines) == 7
    assert err == ""
    names = {str(path.relative_to(folder / "runs/small")) for path in (folder / "runs/small").iterdir()}
    assert names == {"version_0"}
    assert {BEST, LAST, "runs/small/version_0/config.yaml", "runs/small/version_0/report.html"} <= files(folder)
    assert not (folder / "lightning_logs").exists()

    before = files(folder)
    assert main(["validate", "--config", "small.yaml", "--ckpt_path", BEST]) == 0
    measured = capfd.readouterr().out
    assert "val/perplexity" in measured
    assert main(["validate", "--config", "runs/small/version_0/config.yaml", "--ckpt_path", "runs/small"]) == 0
    assert capfd.readouterr().out == measured  # of a run folder, the best
    assert main(["predict", "--config", "small.yaml", "--ckpt_path", "runs/small"]) == 0
    assert "wrote   predictions.pt: next_token [11, 8]" in capfd.readouterr().out
    assert files(folder) - before == {"predictions.pt"}

    # The run's own configuration starts the same run again; a checkpoint goes on where it was.
    arguments = ["--trainer.max_steps", "8", "--ckpt_path", LAST]
    assert main(["fit", "--config", "runs/small/version_0/config.yaml", *arguments]) == 0
    out, err = capfd.readouterr()
    assert "training     8 steps on cpu, going on after step 6" in out
    assert err.startswith("trix: warning: trainer.max_steps (8) differs from the checkpoint's (6)")
    last = torch.load(LAST.replace("version_0", "version_1"), weights_only=True)
    assert last["global_step"] == 8  # the end, though no validation was due


def test_a_finished_run_says_that_nothing_is_left_to_do(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    capfd.readouterr()
    assert main(["fit", "--config", "small.yaml", "--ckpt_path", LAST]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "training     nothing left to do: the run is at step 6 and ends at trainer.max_steps (6)"


def test_a_run_without_a_validation_says_where_its_checkpoint_is(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps", "2"]) == 0
    assert capfd.readouterr().out.splitlines()[-2] == f"checkpoint   {LAST}"
    assert main(["validate", "--config", "small.yaml", "--ckpt_path", "runs/small"]) == 0


def test_a_new_run_leaves_the_checkpoints_of_the_old(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    content = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    assert {str(path.relative_to(folder)) for path in content} == {BEST, LAST}
    assert main(["fit", "--config", "small.yaml"]) == 0
    assert {path: path.read_bytes() for path in content} == content
    assert {name.replace("version_1", "version_0") for name in files(folder) if name.endswith(".ckpt")} == {BEST, LAST}


def test_a_run_without_logs_has_its_checkpoints_in_the_folder_of_the_trainer(folder: Path) -> None:
    for _ in range(2):
        options = ["--trainer.logger=false", "--trainer.default_root_dir=here"]
        assert main(["fit", "--config", "small.yaml", *options]) == 0
    assert {path.name for path in (folder / "here").rglob("*")} == {"checkpoints", "best.ckpt", "best-v1.ckpt", "last.ckpt"}
    assert main(["validate", "--config", "small.yaml", "--ckpt_path", "here"]) == 0


def test_print_config_shows_every_default(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "more.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: DiversityMonitor\n")
    assert main(["fit", "--config", "small.yaml", "--config", "more.yaml", "--model.optimizer.lr=0.5", "--print_config"]) == 0
    printed = capfd.readouterr().out
    for text in (
        "seed_everything: 0",
        "threshold: 0.4",
        "lr: 0.5",
        "weight_decay: 0.1",
        "routing: explicit",
        "ModelCheckpoint",
    ):
        assert text in printed


def test_a_file_without_a_network_trains_the_default_one(folder: Path) -> None:
    (folder / "short.yaml").write_text("model: LanguageModelTask\ndata: TextDataModule\n")
    network = fit_settings(folder / "short.yaml")["model"]["init_args"]["network"]
    assert network == asdict(LanguageModelConfig())


def test_schedule_and_optimizer_are_configurable(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["fit", "--config", "small.yaml", "--trainer.logger=false", "--trainer.fast_dev_run=1"]
    assert main([*base, "--model.optimizer=SGD", "--model.optimizer.lr=0.1", "--model.lr_scheduler=null"]) == 0
    assert main([*base, "--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.eta_min=1e-4"]) == 0


MISTAKES = {
    "--config missing.yaml": "missing.yaml cannot be read: No such file or directory",
    "--config .": "error: . cannot be read: Is a directory",
    "--config broken.yaml": r"broken.yaml must be YAML: did not find expected node content \(line 2\)",
    "--config unknown_key.yaml": r"unknown key 'trainer.max_stps'; did you mean max_steps\? \(in unknown_key.yaml, line 3\)",
    "--config unknown_class.yaml": r"unknown class 'DiversityMonitr'; did you mean DiversityMonitor\? \(in unknown_class.yaml",
    "--config unknown_argument.yaml": r"unknown key 'treshold'; did you mean threshold\? \(in unknown_argument.yaml, line 4\)",
    "--config unknown_event.yaml": r"action must be one of 'insert', 'freeze', 'unfreeze', got 'freze' \(in unknown_event",
    "--config no_condition.yaml": r"when must be keys and values, got 'val/loss' \(in no_condition.yaml, line 4\)",
    "--config wrong_signature.yaml": r"insert tiles 0 of all layers at step 1: signature \(3,\) must have shape \(16,\)",
    "--config twice.yaml": r"trainer.callbacks: number of SurgerySchedule \(2\) must be 1: a checkpoint keeps the state of one",
    "--trainer.callbacks+=RunRecord": r"number of RunRecord \(2\) must be 1 \(`trix` adds one itself\)",
    "--report=3": "report must be keys and values, got '3'",
    "--report.num_token=3": r"unknown option '--report.num_token'; did you mean --report.num_tokens\?",
    "--ckpt_path=.": r"--ckpt_path \. must be a file; --resume goes on from a run folder",
    "--config wrong_tile.yaml": r"tile \(99\) must be < num_tiles \(4\) of layer 0",
    "--trainer.max_step=3": r"unknown option '--trainer.max_step'; did you mean --trainer.max_steps\?",
    "--data.batchsize=3": r"unknown key 'batchsize'; did you mean batch_size\?",
    "--data.batch_size=x": "batch_size must be of type int, got 'x'$",
    "--data.context_length=x": "context_length must be of type int, got 'x'$",
    "--data.batch_size=null": r"batch_size \(None\) must be an int",
    "--data.batches_per_epoch=99999999999999999999": r"batches_per_epoch \(99999999999999999999\) must be <= ",
    "--data.network=x": "unknown key 'network'$",
    "--data.path=~no-such-user/a.txt": "text file '~no-such-user/a.txt' cannot be read",
    "--data.path=[1]": r"path must be of type str, got '\[1\]'",
    "--config list.yaml": "list.yaml must be YAML with keys and values",
    "--config empty.txt": "empty.txt must be YAML with keys and values",
    "--config binary.yaml": "binary.yaml must be YAML in UTF-8: byte 0xff at 0 is not",
    "--config endless.yaml": "a value of the configuration must not hold itself",
    "--model.network=3": "network must be keys and values, got '3'",
    "--model.network=[1]": r"model.network \(\[1\]\) must be keys and values",
    "--model.optimizer.lr=x": "optimizer.lr must be of type float, got 'x'",
    "--trainer.val_check_interval=0": r"trainer.val_check_interval \(0\) must be > 0",
    "--trainer.accumulate_grad_batches=0": r"trainer.accumulate_grad_batches \(0\) must be > 0",
    "--data.batch_size=0": r"batch_size \(0\) must be >= 1",
    "--data.corpus=poems": "corpus must be one of 'pydoc', 'tinyshakespeare', 'wikitext-2', got 'poems'",
    "--data.path=missing.txt": "text file missing.txt cannot be read: No such file or directory",
    "--data.path=empty.txt": "text file empty.txt is empty",
    "--data.path=short.txt": r"training split of short.txt \(5 characters\) must be >= context_length \+ 1 \(9\)",
    "--data=DigitsDataModule": r"vocabulary \(None\) must be a str",
    "--model.vocabulary=abc": "model.vocabulary comes from the data",
    "--model.network.d_model=10 --model.network.n_heads=3": r"d_model \(10\) must be divisible by 2 \* n_heads \(6\)",
    "--model.network.context_length=4": r"data.context_length \(8\) must be <= network.context_length \(4\)",
    "--model.network.d_model=-8": r"d_model \(-8\) must be >= 1",
    "--model.network.n_heads=0": r"n_heads \(0\) must be >= 1",
    "--model.network.context_length=0": r"context_length \(0\) must be >= 1",
    "--model.network.ffn.num_tiles=0": r"num_tiles \(0\) must be >= 1",
    "--model.network.ffn.signatures=frozn": "network.ffn.signatures must be one of 'learned', 'drawn', got 'frozn'",
    "--model.network.d_modle=8": r"unknown option '--model.network.d_modle'; did you mean --model.network.d_model\?",
    "--model.optimizer.lr=-1": "Invalid learning rate: -1",
    "--trainer.max_steps=-1 --trainer.max_epochs=1": r"trainer.max_steps \(-1\) must be >= 1",
    "--seed_everything=x": "seed_everything must be of type bool or int, got 'x'",
    "--ckpt_path=missing.ckpt": "checkpoint missing.ckpt cannot be read: No such file or directory",
    "--ckpt_path=last": "checkpoint last cannot be read",
    "--ckpt_path=text.txt": "text.txt is not a checkpoint",
    "extra": "unexpected argument 'extra'",
    "--model=TrixTask": "class TrixTask is abstract: name a class that derives from it",
}


def test_an_option_of_a_class_that_is_not_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert main(["fit", "--model.network.d_model=8", "--data=TextDataModule"]) == 2
    text = "trix: error: --model.network.d_model needs a class first: --model CLASS, or --config FILE\n"
    assert capfd.readouterr().err == text
    assert files(folder) == before
    (folder / "part.yaml").write_text("model:\n  init_args:\n    network: {d_model: 8}\n")
    assert main(["fit", "--config", "part.yaml", "--config", "small.yaml"]) == 2
    assert capfd.readouterr().err == text.replace("--model.network.d_model", "model.init_args")


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_gives_one_line_and_leaves_nothing(arguments: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.yaml").write_text("a: [")
    (folder / "unknown_key.yaml").write_text("# a comment\ntrainer:\n  max_stps: 4\n")
    callback = "trainer:\n  callbacks+:\n  - class_path: {}\n    init_args: {{{}}}\n"
    (folder / "unknown_class.yaml").write_text(callback.format("DiversityMonitr", ""))
    (folder / "unknown_argument.yaml").write_text(callback.format("DiversityMonitor", "treshold: 0.3"))
    (folder / "unknown_event.yaml").write_text(
        callback.format("SurgerySchedule", "events: [{action: freze, tiles: [0], step: 1}]")
    )
    schedule = "  - class_path: SurgerySchedule\n    init_args: {events: [{action: freeze, tiles: [%d], step: 1}]}\n"
    (folder / "twice.yaml").write_text("trainer:\n  callbacks+:\n" + schedule % 0 + schedule % 1)
    (folder / "wrong_tile.yaml").write_text(
        callback.format("SurgerySchedule", "events: [{action: freeze, tiles: [99], step: 1}]")
    )
    (folder / "no_condition.yaml").write_text(
        callback.format("SurgerySchedule", "events: [{action: freeze, tiles: [0], when: val/loss}]")
    )
    (folder / "wrong_signature.yaml").write_text(
        callback.format("SurgerySchedule", "events: [{action: insert, tiles: [0], signature: +0-, step: 1}]")
    )
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\xf9")
    (folder / "endless.yaml").write_text("a: &a [*a]\n")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("short")
    before = files(folder)
    assert main(["fit", "--config", "small.yaml", *arguments.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert re.search(MISTAKES[arguments], err), err
    assert files(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "the following arguments are required: fit.data, fit.model; a configuration file gives them: --config FILE"),
        (["--config", "small.yaml", "fit"], "the command must come first, got --config; see `trix --help`"),
        (["validate", "--config", "small.yaml"], "`trix validate` needs a checkpoint: --ckpt_path RUN"),
    ],
)
def test_commands_are_checked(arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capfd.readouterr().err == f"trix: error: {message}\n"


def test_a_checkpoint_of_another_network_leaves_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    before = files(folder)
    capfd.readouterr()
    arguments = [f"--ckpt_path={BEST}", "--model.network.d_model=32"]
    assert main(["fit", "--config", "small.yaml", *arguments]) == 2
    expected = f"{BEST}: network.d_model (32) must equal the checkpoint's (16)"
    assert capfd.readouterr().err == f"trix: error: {expected}\n"
    assert files(folder) == before


def test_a_checkpoint_without_the_optimizer_cannot_be_resumed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    checkpoint = torch.load(folder / LAST, weights_only=True)
    for key in ("callbacks", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    torch.save(checkpoint, folder / "weights.ckpt")
    before = files(folder)
    capfd.readouterr()
    assert main(["fit", "--config", "small.yaml", "--ckpt_path=weights.ckpt"]) == 2
    assert "weights.ckpt: the checkpoint holds no callbacks, so no training can go on from it" in capfd.readouterr().err
    assert files(folder) == before
    assert main(["validate", "--config", "small.yaml", "--ckpt_path=weights.ckpt"]) == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = "{class_path: ModelCheckpoint, init_args: {dirpath: kept, filename: best, enable_version_counter: false}}"
    arguments = ["fit", "--config", "small.yaml", f"--trainer.callbacks=[{keeper}]"]
    assert main(arguments) == 0
    content = (folder / "kept/best.ckpt").read_bytes()
    capfd.readouterr()

    limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard_limit))
    try:
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard_limit))
    assert re.fullmatch(r"trix: error: kept/best.ckpt: File too large\n", capfd.readouterr().err)
    assert (folder / "kept/best.ckpt").read_bytes() == content
    assert [path.name for path in (folder / "kept").iterdir()] == ["best.ckpt"]


def test_checkpoints_do_not_pass_through_the_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It may be on another disk: from there a file is copied, and a run that is killed leaves half of it.
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    assert main(["fit", "--config", "small.yaml"]) == 0


def test_too_little_memory_gives_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--data.batch_size=1000000000000"]) == 2
    assert re.fullmatch(r"trix: error: out of memory: Unable to allocate .*\n", capfd.readouterr().err)


def test_traceback_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.errors import UserError

    monkeypatch.setenv("TRIX_TRACEBACK", "1")
    (folder / "empty.txt").touch()
    with pytest.raises(UserError, match="empty"):
        main(["fit", "--config", "small.yaml", "--data.path=empty.txt"])


def test_an_error_of_the_program_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.tasks import LanguageModelTask

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(LanguageModelTask, "training_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", "--config", "small.yaml"])


@pytest.mark.parametrize(
    ("sent", "code", "message"),
    [(signal.SIGINT, 130, "trix: interrupted\n"), (signal.SIGTERM, 143, "trix: terminated\n")],
)
def test_a_signal_ends_the_run_without_success(sent: signal.Signals, code: int, message: str, folder: Path) -> None:
    # A background job ignores SIGINT and passes that on to its children, so the handler is set here.
    start = (
        "import signal, sys; from lightning_modules.cli import main\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    script = Script(start + "sys.exit(main(sys.argv[1:]))", "fit", "--config", "small.yaml", "--trainer.max_steps=100000")
    while "\nstep " not in script.stdout.read_text() and script.process.is_alive():
        time.sleep(0.01)
    time.sleep(0.2)
    assert script.process.pid is not None
    os.kill(script.process.pid, sent)
    result = script.wait(60)
    assert result.returncode == code
    assert result.stderr == message
