"""`trix fit --resume`: a run that was killed ends with the very weights and metrics of one that was not."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from forked_scripts import run_script

from lightning_modules.callbacks.run_record import read_metrics
from lightning_modules.cli import main
from lightning_modules.commands.surgery import is_equal
from lightning_modules.tasks import RoutedTask

KILLED_RUN = Path(__file__).parents[1] / "support" / "killed_run.py"
TEXT = {
    "class_path": "TextDataModule",
    "init_args": {"path": "text.txt", "context_length": 8, "batch_size": 4, "batches_per_epoch": 7},
}
FFN = {"num_tiles": 4}
LANGUAGE_MODEL = {
    "class_path": "LanguageModelTask",
    "init_args": {"network": {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8, "dropout": 0.3, "ffn": FFN}},
}
DIGITS = {"class_path": "DigitsDataModule", "init_args": {"batch_size": 200}}  # seven batches
CLASSIFIER = {
    "class_path": "ClassifierTask",
    "init_args": {"network": {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8, "ffn": FFN}},
}
LANGUAGES = {"class_path": "LanguageIdDataModule", "init_args": {"min_length": 120, "context_length": 8, "batch_size": 150}}
EXPERIMENTS = {"language_model": (LANGUAGE_MODEL, TEXT), "digits": (CLASSIFIER, DIGITS), "languages": (CLASSIFIER, LANGUAGES)}
RUN = Path("runs/small")


def write_config(model: dict[str, Any], data: dict[str, Any]) -> None:
    """small.yaml: epochs of seven steps, a checkpoint every four, a validation every five, of which the worst is kept."""
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "small"}}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss", "mode": "max"}},
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}},
        {"class_path": "DiversityMonitor", "init_args": {"every_n_steps": 3}},
        {"class_path": "RoutingMonitor", "init_args": {"figures": False}},
        {"class_path": "ClaimMonitor"},
    ]
    trainer = {"accelerator": "cpu", "max_steps": 16, "val_check_interval": 5, "check_val_every_n_epoch": None}
    trainer |= {"log_every_n_steps": 2, "logger": logger, "callbacks": callbacks}
    content = {"model": model, "data": data, "trainer": trainer, "report": {"num_tokens": 0}}
    Path("small.yaml").write_text(yaml.safe_dump(content))


def checkpoint(name: str = "last", version: int = 0) -> Path:
    return RUN / f"version_{version}/checkpoints/{name}.ckpt"


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    write_config(LANGUAGE_MODEL, TEXT)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepare(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder runs/ of `trix fit --config small.yaml` for the language model, from start to end."""
    with pytest.MonkeyPatch.context() as patch:
        folder = prepare(tmp_path_factory.mktemp("finished"), patch)
        assert main(["fit", "--config", "small.yaml"]) == 0
    return folder / "runs"


@pytest.fixture
def finished(folder: Path, finished_run: Path) -> Path:
    """A folder with a copy of that run."""
    shutil.copytree(finished_run, folder / "runs")
    return folder


def weights(path: Path, step: int = 16) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == step
    return checkpoint["state_dict"]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, value in a.items() if not torch.equal(value, b[name])]


def run_and_kill(step: int, moment: str = "step") -> None:
    result = run_script(KILLED_RUN, str(step), moment, "fit", "--config", "small.yaml")
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(
    ("name", "moment"), [("language_model", "step"), ("digits", "step"), ("digits", "checkpoint"), ("languages", "step")]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    name: str, moment: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config(*EXPERIMENTS[name])
    assert main(["fit", "--config", "small.yaml"]) == 0
    expected, expected_best = weights(checkpoint()), weights(checkpoint("best"), 5)
    metrics = Path("runs/small/version_0/metrics.csv").read_text()
    assert "claims/layer_1/mean_purity" in metrics
    shutil.rmtree("runs")

    # After the checkpoint of step 10, in the middle of the second epoch; of step 12, in that of step 12.
    run_and_kill(12, moment)
    assert bool(list(RUN.rglob(".*.partial"))) == (moment == "checkpoint")
    capfd.readouterr()
    assert main(["fit", "--resume", "runs/small"]) == 0
    out, err = capfd.readouterr()
    assert "training     16 steps on cpu, going on after step 10\n" in out
    assert f"checkpoint   {checkpoint('best', 1)} (val/loss " in out
    assert err == ""
    assert differing(weights(checkpoint(version=1)), expected) == []
    assert differing(weights(checkpoint("best", 1), 5), expected_best) == []  # taken over
    assert Path("runs/small/version_1/metrics.csv").read_text() == metrics
    assert Path("runs/small/version_0/metrics.csv").read_text() != metrics


SPOIL = """
import lightning as L


class Spoil(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in (7, 13):
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
"""


def test_a_killed_run_that_has_recovered_before_recovers_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("spoil.py").write_text(SPOIL)
    config = yaml.safe_load(Path("small.yaml").read_text())
    config["trainer"]["callbacks"] += [{"class_path": "AutoRecovery"}, {"class_path": "spoil.Spoil"}]
    Path("small.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "small.yaml"]) == 0
    assert "step 8 (nan) must not be NaN: its batch is left out" in capfd.readouterr().err
    expected = torch.load(checkpoint(), weights_only=True)
    shutil.rmtree("runs")

    run_and_kill(12)
    assert main(["fit", "--resume", "runs/small", "--trust", "spoil"]) == 0
    assert "(recovery 2 of 3)" in capfd.readouterr().err
    made = torch.load(checkpoint(version=1), weights_only=True)
    assert made["global_step"] == expected["global_step"] == 16
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert is_equal(made[part], expected[part])
    assert is_equal(made["callbacks"]["AutoRecovery"], expected["callbacks"]["AutoRecovery"])


def test_a_resumed_run_that_is_killed_before_its_validation_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps=10"]) == 0
    weights(checkpoint("best"), 5)  # an earlier one, which a resumed run takes over
    original = checkpoint().read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RoutedTask, "training_step", killed)
        assert main(["fit", "--resume", "runs/small", "--trainer.max_steps=16"]) == 130
    assert checkpoint(version=1).read_bytes() == original
    capfd.readouterr()
    assert main(["fit", "--resume", "runs/small", "--trainer.max_steps=16"]) == 0
    assert "going on after step 10\n" in capfd.readouterr().out
    first, last = (read_metrics(Path(f"runs/small/version_{version}/metrics.csv")) for version in (0, 2))
    assert first[0] in last  # the history is whole
    assert checkpoint().read_bytes() == original


def test_dropout_makes_the_weights_depend_on_the_random_state(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without this the test above would pass if no state were put back.
    from lightning_modules.callbacks.random_state import RandomState

    expected = weights(checkpoint())
    assert main(["fit", "--resume", str(checkpoint("step=8"))]) == 0
    assert differing(weights(checkpoint(version=1)), expected) == []
    monkeypatch.setattr(RandomState, "on_train_start", lambda *_: None)
    assert main(["fit", "--resume", str(checkpoint("step=8"))]) == 0
    assert differing(weights(checkpoint(version=2)), expected) != []


def test_how_often_is_validated_leaves_the_training_as_it_is(finished: Path) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.val_check_interval=3"]) == 0
    assert differing(weights(checkpoint(version=1)), weights(checkpoint())) == []


def test_the_best_of_a_run_is_left_behind_by_one_that_goes_on_from_before_it(finished: Path) -> None:
    weights(checkpoint("best"), 5)
    arguments = ["fit", "--resume", str(checkpoint("step=4")), "--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(arguments) == 0  # with a validation of its own at step 8 alone
    weights(checkpoint("best", version=1), 8)


def test_other_options_go_with_resume(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps", "8"]) == 0
    capfd.readouterr()
    assert main(["fit", "--trainer.max_steps", "12", "--resume=runs/small"]) == 0
    out, err = capfd.readouterr()
    assert "training     12 steps on cpu, going on after step 8" in out
    assert err.startswith("trix: warning: trainer.max_steps (12) differs from the checkpoint's (8)")
    weights(checkpoint(version=1), step=12)
    # With a configuration of one's own the run's is not read.
    Path("runs/small/version_0/config.yaml").unlink()
    arguments = ["--resume", str(checkpoint("step=4")), "--config", "small.yaml", "--trainer.max_steps=5"]
    assert main(["fit", *arguments]) == 0
    assert "training     5 steps on cpu, going on after step 4" in capfd.readouterr().out


@pytest.mark.parametrize("options", [[], ["--trainer.limit_val_batches=0"]], ids=["validated", "not_validated"])
def test_a_run_is_extended_as_if_it_had_not_ended(options: list[str], folder: Path) -> None:
    write_config({**LANGUAGE_MODEL, "init_args": {**LANGUAGE_MODEL["init_args"], "lr_scheduler": None}}, TEXT)
    fit = ["fit", "--config", "small.yaml", "--trainer.callbacks=[]", *options]
    assert main([*fit, "--trainer.max_steps=10"]) == 0
    # It ends within the first epoch of seven steps, at its end, and within the second one.
    assert main([*fit, "--trainer.max_steps=6"]) == 0
    for version, max_steps in enumerate([7, 9, 10], start=1):
        resume = ["fit", "--resume", f"runs/small/version_{version}", *options]
        assert main([*resume, f"--trainer.max_steps={max_steps}"]) == 0
    assert differing(weights(checkpoint(version=4), step=10), weights(checkpoint(), step=10)) == []


def test_a_run_without_a_checkpoint_is_passed_over(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps=4"]) == 0
    # A later run that ended before its first checkpoint.
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps=1", "--trainer.enable_checkpointing=false",
                 "--trainer.callbacks=[]", "--model.network.d_model=32"]) == 0  # fmt: skip
    assert Path("runs/small/version_1/config.yaml").is_file()
    shutil.move("runs", "moved")
    capfd.readouterr()
    assert main(["fit", "--resume", "moved/small"]) == 0
    assert "nothing left to do: the run is at step 4 and ends at trainer.max_steps (4)" in capfd.readouterr().out


def test_checkpoints_beside_the_logs_are_gone_on_from_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keeper = "{class_path: ModelCheckpoint, init_args: {dirpath: runs/small, save_last: true}}"
    assert main(["fit", "--config", "small.yaml", f"--trainer.callbacks=[{keeper}]", "--trainer.max_steps=5"]) == 0
    # A later run whose checkpoints are elsewhere.
    keeper = keeper.replace("runs/small", "elsewhere")
    assert main(["fit", "--config", "small.yaml", f"--trainer.callbacks=[{keeper}]", "--trainer.max_steps=2"]) == 0
    shutil.move("runs", "moved")  # the folder of the logs is known by its name beside the checkpoint
    capfd.readouterr()
    assert main(["fit", "--resume", "moved/small"]) == 0
    assert "nothing left to do: the run is at step 5 and ends at trainer.max_steps (5)" in capfd.readouterr().out


def test_a_run_without_callbacks_is_resumed_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for max_steps in ("3", "4"):
        changes = ["--trainer.logger=true", "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
        assert main(["fit", "--config", "small.yaml", *changes, f"--trainer.max_steps={max_steps}"]) == 0
    for run, step in (("lightning_logs", 4), ("lightning_logs/version_0", 3)):  # the newest, or the one that is named
        capfd.readouterr()
        assert main(["fit", "--resume", run, "--trainer.max_steps=5"]) == 0
        assert f"going on after step {step}\n" in capfd.readouterr().out


def test_without_a_good_last_checkpoint_the_newest_other_one_is_taken(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    last, final = checkpoint(), checkpoint("step=16")
    last.write_bytes(last.read_bytes()[:1000])
    no_optimizer = torch.load(final, weights_only=True)
    del no_optimizer["optimizer_states"]
    torch.save(no_optimizer, final)
    checkpoint("best").unlink()
    for path in last.parent.glob("step=*.ckpt"):
        os.utime(path, (0, int(path.stem.removeprefix("step="))))
    capfd.readouterr()
    assert main(["fit", "--resume", "runs/small"]) == 0
    out, err = capfd.readouterr()
    assert "going on after step 12\n" in out
    assert err == (
        f"trix: warning: {last} is not a checkpoint that can be loaded safely (or it is cut short); "
        f"{final}: the checkpoint holds no optimizer_states, so no training can go on from it "
        f"(save_weights_only: false); going on from {checkpoint('step=12')} (step 12)\n"
    )

    shutil.rmtree("runs/small/version_1")
    last.unlink()
    final.unlink()
    assert main(["fit", "--resume", "runs/small", "--print_config"]) == 0
    out, err = capfd.readouterr()
    assert err == f"trix: warning: runs/small holds no last.ckpt; going on from {checkpoint('step=12')} (step 12)\n"
    assert f"ckpt_path: {checkpoint('step=12')}" in out


def test_a_resume_that_cannot_be_gives_one_line_and_leaves_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps=4"]) == 0
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/last.ckpt").write_bytes(b"no checkpoint")
    Path("bare").mkdir()
    shutil.copy(checkpoint(), "bare/last.ckpt")
    shutil.move("runs/small/version_0/config.yaml", "kept.yaml")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capfd.readouterr()
    with_config = "--config kept.yaml --resume runs/small"
    for arguments, message in {
        "fit --resume missing": "--resume missing: there is no such run folder or checkpoint",
        "fit --resume empty": r"--resume empty: the folder holds no checkpoint \(\*.ckpt\)",
        "fit --resume broken": "--resume broken: no checkpoint can be resumed from: broken/last.ckpt is not a checkpoint that ",
        "fit --resume text.txt": r"text.txt is not a checkpoint that can be loaded safely \(or it is cut short\)",
        "fit --resume bare": "bare/last.ckpt: its run has left no config.yaml there: --config FILE gives the configuration",
        "fit --resume": "--resume needs a run folder or a checkpoint: --resume RUN",
        "fit --resume= --config kept.yaml": "--resume needs a run folder or a checkpoint: --resume RUN",
        "fit --resume --config kept.yaml": "--resume needs a run folder or a checkpoint: --resume RUN",
        "fit --resum runs/small --config kept.yaml": r"unknown option '--resum'; did you mean --resume\?",
        "validate --resume runs/small": "--resume is for `trix fit`; `trix validate` takes --ckpt_path RUN",
        f"fit {with_config} --ckpt_path x.ckpt": "--resume and --ckpt_path both name where to go on: only one may be given",
        f"fit {with_config} --model.network.d_model 32": (
            rf"{checkpoint()}: network.d_model \(32\) must equal the checkpoint's \(16\)"
        ),
    }.items():
        assert main(arguments.split()) == 2, arguments
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(f"trix: error: {message}.*\n", err), err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
