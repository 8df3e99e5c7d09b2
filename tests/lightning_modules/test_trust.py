"""Whose code a configuration may name: a run folder's or a checkpoint's own word is never enough to import a module."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from lightning_modules.cli import main
from lightning_modules.errors import UserError
from lightning_modules.trust import named_on_command_line, take_out_trust

TASK_FILE = """\
from pathlib import Path
from lightning_modules.callbacks import RoutingMonitor
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

Path(__file__).with_name("imported").touch()

class Task(LanguageModelTask): ...
class Data(TextDataModule): ...
class Monitor(RoutingMonitor): ...
class Optimizer(SGD): ...
class Scheduler(ConstantLR):
    def __init__(self, optimizer, num_steps): super().__init__(optimizer)
def run(command: str): Path(__file__).with_name("executed").touch()
"""
NETWORK = {"d_model": 8, "num_layers": 1, "n_heads": 1, "context_length": 8, "ffn": {"num_tiles": 2}}
RUN = Path("runs/small")


def config(**changes: Any) -> dict[str, Any]:
    """A run of two steps; changes: dotted keys."""
    content: dict[str, Any] = {
        "model": {"class_path": "LanguageModelTask", "init_args": {"network": NETWORK}},
        "data": {"class_path": "TextDataModule", "init_args": {"path": "text.txt", "context_length": 8, "batch_size": 2}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "val_check_interval": 1, "check_val_every_n_epoch": None},
        "report": {"num_tokens": 0},
    }
    content["trainer"] |= {
        "limit_val_batches": 1,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "small"}},
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}}],
    }
    for name, value in changes.items():
        place = content
        *path, last = name.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    return content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIX_TRUST", raising=False)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    Path("own_parts.py").write_text(TASK_FILE)
    yield tmp_path
    sys.modules.pop("own_parts", None)


def write(path: Path | str, content: Any) -> str:
    Path(path).write_text(yaml.safe_dump(content))
    return str(path)


def trained_run(content: dict[str, Any], **changes: Any) -> Path:
    """A run folder whose config.yaml says something else than what it was trained with. changes: to what it is trained with."""
    assert main(["fit", "--config", write("small.yaml", config(**changes))]) == 0
    write(RUN / "version_0/config.yaml", content)
    return RUN


OWN_PARTS = {
    "task": {"model__class_path": "own_parts.Task"},
    "data": {"data__class_path": "own_parts.Data"},
    "callback": {"trainer__callbacks": [{"class_path": "own_parts.Monitor", "init_args": {"figures": False}}]},
    "optimizer": {"model__init_args__optimizer": {"class_path": "own_parts.Optimizer", "init_args": {"lr": 0.1}}},
    "scheduler": {"model__init_args__lr_scheduler": {"class_path": "own_parts.Scheduler"}},
    "in_short": {"model__init_args__optimizer": "own_parts.Optimizer"},
}


@pytest.mark.parametrize("changes", OWN_PARTS.values(), ids=OWN_PARTS)
def test_a_run_folder_imports_nothing_on_its_own_word(
    changes: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(config(**changes))
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trix: error: class own_parts.")
    assert f"(named by {run}/version_0/config.yaml)" in error
    assert error.endswith("add --trust own_parts")
    assert not Path("imported").exists()
    assert not (run / "version_1").exists()


@pytest.mark.parametrize("way", ["option", "option=", "variable"])
def test_the_user_may_trust_a_module(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(config(**OWN_PARTS["task"]), **OWN_PARTS["task"])
    sys.modules.pop("own_parts")
    Path("imported").unlink()
    options = {"option": ["--trust", "own_parts"], "option=": ["--trust=other,own_parts"], "variable": []}[way]
    if way == "variable":
        monkeypatch.setenv("TRIX_TRUST", "other, own_parts")
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "3", *options]) == 0
    assert Path("imported").exists()
    # It counts for that command alone.
    monkeypatch.delenv("TRIX_TRUST", raising=False)
    sys.modules.pop("own_parts")
    Path("imported").unlink()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "4"]) == 2
    assert not Path("imported").exists()


@pytest.mark.parametrize("changes", OWN_PARTS.values(), ids=OWN_PARTS)
def test_what_the_user_names_is_trusted(changes: dict[str, Any], folder: Path) -> None:
    assert main(["fit", "--config", write("own.yaml", config(**changes))]) == 0
    assert Path("imported").exists()
    assert str(folder) not in sys.path


def test_an_option_of_the_command_line_is_the_users_word_as_well(folder: Path) -> None:
    assert main(["fit", "--config", write("small.yaml", config()), "--model", "own_parts.Task"]) == 0
    assert Path("imported").exists()


HARMFUL = {
    "standard library": ({"class_path": "os.system", "init_args": {"command": "touch executed"}}, "standard library"),
    "function": ({"class_path": "own_parts.run", "init_args": {"command": "x"}}, "must name a class, not a function"),
    "function of torch": ({"class_path": "torch.manual_seed", "init_args": {"seed": 3}}, "must name a class, not a function"),
    "other class": ({"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 3}}, "Optimizer"),
    "in short": ("os.getcwd", "standard library"),
    "function in short": ("own_parts.run", "Optimizer"),
    "rules": ({"class_path": "jsonargparse.set_parsing_settings"}, "jsonargparse"),
}


@pytest.mark.parametrize(("value", "text"), HARMFUL.values(), ids=HARMFUL)
@pytest.mark.parametrize("slot", ["optimizer", "lr_scheduler"])
def test_an_optimizer_is_an_optimizer(
    slot: str, value: Any, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.initial_seed()
    assert main(["fit", "--config", write("bad.yaml", config(**{f"model__init_args__{slot}": value}))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text.replace("Optimizer", {"optimizer": "Optimizer", "lr_scheduler": "LRScheduler"}[slot]) in error
    assert not Path("executed").exists()
    assert not RUN.exists()
    assert torch.initial_seed() == before


def test_a_module_that_cannot_be_imported_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_parts.py").write_text("import nothing_there\n")
    assert main(["fit", "--config", write("own.yaml", config(model__class_path="own_parts.Task"))]) == 2
    reason = "class own_parts.Task cannot be imported: No module named 'nothing_there' (in own.yaml, line "
    assert capsys.readouterr().err.startswith(f"trix: error: {reason}")


@pytest.mark.parametrize("key", ["data", "trainer__logger", "trainer__strategy", "trainer__profiler", "trainer__plugins"])
def test_every_other_place_takes_its_own_kind_of_class_alone(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("own_parts.run", "torch.nn.Linear", "subprocess.Popen"):
        value = {"class_path": path, "init_args": {"command": "touch executed"}}
        assert main(["fit", "--config", write("bad.yaml", config(**{key: value}))]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("executed").exists()


def test_a_value_of_any_type_stays_a_value(folder: Path) -> None:
    # A logger takes any keyword. A class there, which runs a command as it is made, would need no place of its own.
    runner = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
    arguments = {"entrypoint": "touch", "args": ["executed"], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs"}}
    logger["dict_kwargs"] = {"comment": {"class_path": runner, "init_args": arguments}}
    assert main(["fit", "--config", write("bad.yaml", config(trainer__logger=logger))]) == 0
    assert list(folder.rglob("executed")) == []


def test_a_function_inside_a_callback_is_not_called(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = {"class_path": "torch.utils.cpp_extension.load", "init_args": {"name": "executed", "sources": ["x.cpp"]}}
    callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": build}}
    assert main(["fit", "--config", write("bad.yaml", config(trainer__callbacks=[callback]))]) == 2
    rule = "trainer.callbacks.on_fit_start.class_path (torch.utils.cpp_extension.load) must name a class, not a function"
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "own parts", "../own", "own-parts", "jsonargparse", "jsonargparse.core"])
def test_trust_needs_the_name_of_a_module(name: str) -> None:
    with pytest.raises(UserError, match="--trust"):
        take_out_trust(["fit", f"--trust={name}"])


def test_trust_needs_a_value() -> None:
    with pytest.raises(UserError, match="--trust needs the name of a module"):
        take_out_trust(["fit", "--trust"])
    with pytest.raises(UserError, match="--trust needs the name of a module"):
        take_out_trust(["fit", "--trust", "--config"])


def test_only_class_paths_are_the_users_word() -> None:
    named = named_on_command_line(
        ["fit", "--data.path", "text.txt", "--model=own.Task", "--trainer.callbacks+", "more.Monitor", "--seed", "os.path"],
        [{"a": ["parts.One", 3], "b": {"class_path": "subprocess.Popen"}}],
    )
    assert named == ["more", "own", "parts"]
