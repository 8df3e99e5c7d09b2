"""A task and data of the user's own: all commands work on their runs, and none imports them on a checkpoint's word."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from forked_scripts import run_script
from outside_parts import MODULES, write_parts

from lightning_modules.cli import main
from lightning_modules.tasks import TrixTask, load_checkpoint
from lightning_modules.trust import working_folder_searched

KILLED_RUN = Path(__file__).parents[1] / "support" / "killed_run.py"
OWN_MODULE = {"moons": "own_task", "vectors": "own_data", "steps": "own_steps"}


def forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules, their configurations, and a run of each."""
    folder, before = tmp_path_factory.mktemp("own"), Path.cwd()
    write_parts(folder)
    os.chdir(folder)
    try:
        for name in OWN_MODULE:
            assert main(["fit", "--config", f"{name}.yaml"]) == 0
    finally:
        os.chdir(before)
        forget()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the working folder of a user who has imported nothing yet."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIX_TRUST", raising=False)
    Path("imported").unlink()
    forget()
    yield tmp_path
    forget()


def checkpoint(name: str, version: int = 0, kind: str = "last") -> Path:
    return Path(f"runs/{name}/version_{version}/checkpoints/{kind}.ckpt")


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", OWN_MODULE)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.move(f"runs/{name}", "whole")
    step = TrixTask.optimizer_step

    def step_or_stop(self: TrixTask, *args: Any, **settings: Any) -> None:
        if self.global_step == 4:
            raise KeyboardInterrupt
        step(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(TrixTask, "optimizer_step", step_or_stop)
        assert main(["fit", "--config", f"{name}.yaml"]) == 130
    forget()
    capfd.readouterr()
    assert main(["fit", "--resume", f"runs/{name}", "--trust", OWN_MODULE[name]]) == 0
    shown = capfd.readouterr().out
    assert "going on after step 3" in shown
    assert re.search(r"^step 6 .*val/loss \d\.\d{4}", shown, re.M)  # also of the task that leaves out prog_bar=True
    assert are_equal(weights(checkpoint(name, 1)), weights(Path("whole/version_0/checkpoints/last.ckpt")))


def test_a_killed_run_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    shutil.move("runs/moons", "whole")
    result = run_script(KILLED_RUN, "5", "step", "fit", "--config", "moons.yaml")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert main(["fit", "--resume", "runs/moons", "--trust=own_task"]) == 0
    assert are_equal(weights(checkpoint("moons", 1)), weights(Path("whole/version_0/checkpoints/last.ckpt")))


def test_a_regression_learns(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rate = "--model.optimizer.lr=0.02"
    assert main(["fit", "--config", "moons.yaml", "--trainer.max_steps=60", "--trainer.val_check_interval=30", rate]) == 0
    losses = [float(found) for found in re.findall(r"val/loss (\d\.\d+)", capfd.readouterr().out)]
    assert losses[-1] < 0.12  # a straight line through two moons leaves 0.1, their mean 0.25


@pytest.mark.parametrize("name", OWN_MODULE)
def test_the_report_at_the_end_of_a_run_says_what_the_data_is(name: str, folder: Path) -> None:
    page = Path(f"runs/{name}/version_0/report.html").read_text()
    described = {
        "moons": "validation data of MoonsDataModule (num_points 200, noise 0.1, batch_size 32, seed 0)",
        "vectors": "validation data of VectorsDataModule (num_sequences 64, length 4)",
        "steps": "validation data of NoiseDataModule<",
    }[name]
    assert described in page
    assert not re.search("handwritten|validation text|languages", page)
    shown = {"moons": "<code>1</code>", "vectors": "<code>high</code>", "steps": "<mark>"}[name]
    assert shown in page
    tokens = {"moons": "40 tokens, in sequences of 1<", "vectors": "80 tokens, in sequences of 4<", "steps": "10 tokens"}[name]
    assert tokens in page


@pytest.mark.parametrize("name", ["moons", "vectors"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_measured(command: str, name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", f"{name}.yaml", "--ckpt_path", f"runs/{name}"]) == 0
    assert "/loss" in capfd.readouterr().out


def test_predictions_are_written(folder: Path) -> None:
    assert main(["predict", "--config", "moons.yaml", "--ckpt_path", "runs/moons"]) == 0
    assert {name: list(value.shape) for name, value in torch.load("predictions.pt", weights_only=True).items()} == {
        "value": [40]
    }
    forget()
    assert main(["predict", "--config", "vectors.yaml", "--ckpt_path", "runs/vectors"]) == 0
    assert list(torch.load("predictions.pt", weights_only=True)["label"].shape) == [20]


def reading(name: str) -> dict[str, list[str]]:
    """Every command that takes a checkpoint and no configuration, on one of the runs."""
    run = f"runs/{name}"
    return {
        "inspect": ["inspect", run, "--output", "new/page.html"],
        "why": ["why", run, "--index", "3"],
        "surgery": ["surgery", run, "freeze", "--layer", "0", "--tile", "1", "--tag", "x", "--output", "new/edited.ckpt"],
        "export": ["export", "--ckpt", run, "--output", "new/model.onnx"],
    }


@pytest.mark.parametrize("command", ["inspect", "why", "surgery", "export", "resume"])
@pytest.mark.parametrize("name", ["moons", "vectors"])
def test_without_trust_nothing_is_imported(name: str, command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    arguments = ["fit", "--resume", f"runs/{name}"] if command == "resume" else reading(name)[command]
    if (name, command) == ("vectors", "surgery"):  # it has no need of the data
        assert main(arguments) == 0
        assert not Path("imported").exists()
        return
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    kind = {"moons": "own_task.MoonsTask", "vectors": "own_data.VectorsDataModule"}[name]
    source = "config.yaml" if command == "resume" else checkpoint(name, kind="best")
    assert re.fullmatch(
        rf"trix: error: class {kind} \(named by \S*{source}\) is code from outside torch, lightning and trix: if you trust it, "
        rf"add --trust {OWN_MODULE[name]}\n",
        err,
    )
    assert out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("way", ["option", "option=", "variable"])
@pytest.mark.parametrize("command", ["inspect", "why", "surgery"])
def test_trust_is_one_option(
    command: str, way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"option": ["--trust", "own_task"], "option=": ["--trust=other,own_task"], "variable": []}[way]
    if way == "variable":
        monkeypatch.setenv("TRIX_TRUST", "other, own_task")
    assert main([*reading("moons")[command], *options]) == 0
    assert Path("imported").exists()
    assert str(folder) not in sys.path


def test_why_writes_an_example_as_its_data_does(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "runs/moons", "--index", "3", "--trust=own_task"]) == 0
    out, _ = capfd.readouterr()
    assert re.match(r"point 3, label [01], layer 0, 4 tiles\n", out)
    assert re.search(r"^ 0  -?\d\S*,-?\d\S* +\d", out, re.MULTILINE)
    assert main(["why", "runs/vectors", "--index", "19", "--trust=own_data"]) == 0
    out, _ = capfd.readouterr()
    assert re.match(r"example 19: a (low|high), taken for a (low|high), layer 0, 2 tiles\n", out)
    for name, module, problem in (
        ("moons", "own_task", "MoonsTask needs one of its validation points: --index N"),
        ("vectors", "own_data", "a classifier needs one of its validation examples: --index N"),
    ):
        assert main(["why", f"runs/{name}", "--prompt", "a", f"--trust={module}"]) == 2
        assert capfd.readouterr().err == f"trix: error: {problem}\n"
    assert main(["why", "runs/vectors", "--index", "20", "--trust=own_data"]) == 2
    assert "--index (20) must be >= 0 and < validation examples (20)" in capfd.readouterr().err


def test_a_task_without_labels_or_routing_is_read_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trust = "--trust=own_steps"
    assert main(["inspect", "runs/steps", "--output", "a.html", "--num-tokens", "3", trust]) == 0
    assert ">3 tokens, in sequences of 1<" in Path("a.html").read_text()
    assert main(["why", "runs/steps", "--index", "9", trust]) == 0
    assert "example 9, layer 0, 2 tiles\n" in capfd.readouterr().out


def test_own_data_is_exported_with_a_task_of_ours(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*reading("vectors")["export"], "--trust=own_data"]) == 0
    assert "parity" in capfd.readouterr().out
    assert Path("new/model.onnx").is_file()


@pytest.mark.parametrize(("name", "trust", "width"), [("moons", "own_task", 2), ("steps", "own_steps", 5)])
def test_a_task_of_ones_own_is_exported(
    name: str, trust: str, width: int, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*reading(name)["export"], "--trust", trust]) == 0
    assert "parity" in capfd.readouterr().out
    session = ort.InferenceSession("new/model.onnx", providers=["CPUExecutionProvider"])
    task = load_checkpoint(checkpoint(name, kind="best"), [trust])[0]
    for num_examples in (1, 7):  # any number at a time
        x = torch.randn(num_examples, width, generator=torch.Generator().manual_seed(0))
        (answer,) = session.run(["output_0"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), task(x).detach(), rtol=1e-5, atol=1e-6)


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a function": ("moons", {"task_class": "os.system"}, "class os.system .* is in Python's standard library"),
    "a module that is not trusted": ("moons", {"task_class": "own_data.VectorsDataModule"}, "own_data.* add --trust own_data"),
    "a module that is much alike": ("moons", {"task_class": "own_task2.MoonsTask"}, "own_task2.* add --trust own_task2"),
    "a class of torch": (
        "moons",
        {"task_class": "torch.nn.Linear"},
        "torch.nn.Linear .* must be in lightning_modules; if you trust it, add --trust torch",
    ),
    "a function of torch": ("moons", {"task_class": "torch.load"}, "torch.load .* must be in lightning_modules"),
    "data as a task": ("moons", {"task_class": "own_task.MoonsDataModule"}, "must be a class derived from .*TrixTask"),
    "a plain module": ("moons", {"task_class": "lightning.LightningModule"}, "must be in lightning_modules"),
    "a base class": (
        "moons",
        {"task_class": "lightning_modules.tasks.TrixTask", "task": ""},
        "must be a class derived from lightning_modules.tasks.task.TrixTask",
    ),
    "an abstract class": (
        "moons",
        {"task_class": "lightning_modules.tasks.RoutedTask", "task": ""},
        "RoutedTask .* must have no abstract methods, it has predict_step",
    ),
    "a base class as data": (
        "vectors",
        {"data_class": "lightning_modules.data.TrixDataModule"},
        "must be a class derived from lightning_modules.data.data_module.TrixDataModule",
    ),
    "data of lightning, which downloads": (
        "vectors",
        {"data_class": "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"},
        "MNISTDataModule .* must be in lightning_modules; if you trust it, add --trust lightning",
    ),
    "another task": ("moons", {"task_class": "lightning_modules.tasks.LanguageModelTask"}, "must be 'language_model'"),
    "no such class": ("moons", {"task_class": "own_task.Moon"}, "own_task.Moon .* cannot be imported: AttributeError"),
    "no such module": ("moons", {"task_class": "own_task.moon.Task"}, "cannot be imported: ModuleNotFoundError"),
    "a number": ("moons", {"task_class": 5}, r"class path \(5\) must name a class of a module"),
    "a list": ("moons", {"task_class": ["os.system"]}, r"class path \(\['os.system'\]\) must name a class"),
    "a relative path": ("moons", {"task_class": "../own_task.MoonsTask"}, "must name a class of a module"),
    "a local class": ("moons", {"task_class": "own_task.make.<locals>.Task"}, "must name a class of a module"),
    "a function as data": (
        "vectors",
        {"data_class": "own_data.make"},
        "own_data.make .* must be a class derived from .*DataModule",
    ),
    "a task as data": (
        "vectors",
        {"data_class": "lightning_modules.tasks.ClassifierTask"},
        "derived from .*LightningDataModule",
    ),
    "a command as data": ("vectors", {"data_class": "subprocess.Popen"}, "subprocess.Popen .* standard library"),
    "no data": ("vectors", {"data_class": None}, r"data module \('VectorsDataModule'\) must be named by the checkpoint"),
    "other data": ("vectors", {"data_class": "lightning_modules.data.text.TextDataModule"}, "data settings .* do not fit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_runs_nothing(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, changes, problem = HOSTILE[name]
    content = torch.load(checkpoint(run), weights_only=True)
    content["trix"].update(changes)
    torch.save(content, "hostile.ckpt")
    Path("own_task2.py").write_text(MODULES["own_data"])
    before = sorted(folder.rglob("*"))
    for arguments in (["inspect", "hostile.ckpt"], ["export", "--ckpt", "hostile.ckpt", "--output", "new/a.onnx"]):
        assert main([*arguments, "--trust", OWN_MODULE[run]]) == 2
        out, err = capfd.readouterr()
        assert re.fullmatch(f"trix: error: .*{problem}.*\n", err), err
        assert "hostile.ckpt" in err
        assert out == ""
    Path("imported").unlink(missing_ok=True)  # of the module that is trusted
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert [path for path in sorted(folder.rglob("*")) if path not in before] == []
    assert "own_task2" not in sys.modules


def test_settings_of_a_checkpoint_stay_within_its_weights(folder: Path) -> None:
    content = torch.load(checkpoint("moons"), weights_only=True)
    content["hyper_parameters"]["width"] = 2**20
    torch.save(content, "hostile.ckpt")
    problem = r"^hostile.ckpt: the checkpoint's weights do not fit the network: size mismatch"
    with working_folder_searched(["own_task"]), pytest.raises(ValueError, match=problem):
        load_checkpoint("hostile.ckpt", ["own_task"])


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "import nothing_there", "1 / 0"])
def test_a_trusted_module_that_cannot_be_imported_says_why(code: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("own_task.py").write_text(code)
    assert main(["inspect", "runs/moons", "--trust=own_task"]) == 2
    assert re.fullmatch(
        r"trix: error: class own_task.MoonsTask \(named by .*\) cannot be imported: \w+: .*\n", capfd.readouterr().err
    )


PLAIN = """
import lightning as L
class Plain(L.LightningModule):
    def training_step(self, batch): ...
"""
MISTAKES: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "a plain LightningModule": (
        lambda: Path("plain.py").write_text(PLAIN),
        ["--model=plain.Plain"],
        "class plain.Plain must derive from lightning_modules.tasks.TrixTask, as docs/how-to/own-task.md shows",
    ),
    "a plain LightningModule in the file": (
        lambda: Path("plain.py").write_text(PLAIN) and edit("moons.yaml", "own_task.MoonsTask", "plain.Plain"),
        [],
        r"class plain.Plain must derive from lightning_modules.tasks.TrixTask.* \(in moons.yaml, line \d\)",
    ),
    "an optimizer that no file can name": (
        lambda: edit("own_task.py", "OptimizerCallable = AdamW", "OptimizerCallable = lambda p: AdamW(p, 0.1)"),
        [],
        "default of model.optimizer must be a class, or like `lambda p: AdamW",
    ),
    "hyperparameters that are none": (
        lambda: edit("own_task.py", '{"width": width, "num_tiles": num_tiles}', '{"width": width, "optimizer": optimizer}'),
        [],
        r"hyperparameter optimizer of MoonsTask \(\w+\) must be a plain value: self.save_hyperparameters",
    ),
    "hyperparameters that are not kept": (
        lambda: (
            edit("own_task.py", "num_points: int = 400, noise: float = 0.1", "noise: float, num_points: int = 400")
            or edit("own_task.py", '"noise": noise, ', "")
        ),
        ["--data.noise=0.2"],
        "hyperparameters of MoonsDataModule must hold noise, so that a checkpoint can rebuild it",
    ),
    "claims of a regression": (
        lambda: None,
        ["--trainer.callbacks+=ClaimMonitor"],
        "ClaimMonitor needs a task with class_names, which MoonsTask lacks",
    ),
}


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, options, problem = MISTAKES[name]
    prepare()
    shutil.rmtree("runs")
    assert main(["fit", "--config", "moons.yaml", *options]) == 2
    assert re.fullmatch(f"trix: error: {problem}.*\n", capfd.readouterr().err)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["RoutingMonitor", "Evolution"])
def test_callbacks_that_read_the_routing_say_so(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("runs")
    assert main(["fit", "--config", "steps.yaml", f"--trainer.callbacks+={name}"]) == 2
    rule = "needs a task whose steps return their routing (reports_routing), as those of a RoutedTask; AutoencoderTask is none"
    assert capfd.readouterr().err == f"trix: error: {name} {rule}\n"
    assert not Path("runs").exists()


def test_callbacks_that_do_without_classes_follow_a_regression(folder: Path) -> None:
    callbacks = ["RoutingMonitor", "Evolution", "{class_path: DiversityMonitor, init_args: {every_n_steps: 2}}"]
    assert main(["fit", "--config", "moons.yaml", *(f"--trainer.callbacks+={name}" for name in callbacks)]) == 0
    metrics = Path("runs/moons/version_1/metrics.csv").read_text()
    assert "routing/layer_0/churn" in metrics
    assert "diversity/mean" in metrics
