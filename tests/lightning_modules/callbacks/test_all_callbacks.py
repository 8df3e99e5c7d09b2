"""What holds for every callback: public API, plain state that resumes, and an example in its docstring that runs."""

import ast
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import SENTENCE, MakeTrainer, small_network

from lightning_modules import callbacks
from lightning_modules.callbacks import (
    ClaimMonitor,
    ClaimWatch,
    DiversityMonitor,
    Evolution,
    EvolutionPolicy,
    MetricCondition,
    ReclusterSchedule,
    RoutingMonitor,
    SurgeryEvent,
    SurgerySchedule,
)
from lightning_modules.cli import main
from lightning_modules.commands.surgery import is_equal
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig

KINDS = {name: kind for name in callbacks.__all__ if issubclass(kind := getattr(callbacks, name), L.Callback)}
STATEFUL = {
    *("AutoRecovery", "DiversityMonitor", "Evolution", "RandomState", "ReclusterSchedule", "RoutingMonitor"),
    *("RunNotebook", "RunRecord", "StabilityMonitor", "SurgerySchedule"),
}
ADDED_BY_TRIX = {"LastCheckpoint", "RandomState", "ReportPage", "RunNotebook", "RunRecord", "RunReport"}
EVENTS = [
    SurgeryEvent("insert", [3], step=1, signature={"positive_dims": [0], "negative_dims": [1]}, tag="concept"),
    SurgeryEvent("freeze", [1], [0], when=MetricCondition("val/loss", above=0.0)),
    SurgeryEvent("unfreeze", [3], epoch=9),
]
MAKERS: dict[str, Callable[[], L.Callback]] = KINDS | {
    "ClaimMonitor": lambda: ClaimMonitor(watch=[ClaimWatch("e", 1, 2)]),
    "DiversityMonitor": lambda: DiversityMonitor(1.0, 1, "medium"),
    "Evolution": lambda: Evolution(EvolutionPolicy(every_n_steps=2, warmup=2, reseed_below=0.9)),
    "ReclusterSchedule": lambda: ReclusterSchedule(2),
    "RoutingMonitor": lambda: RoutingMonitor(figures=False),
    "SurgerySchedule": lambda: SurgerySchedule(EVENTS),
}


class StateAtStart(L.Callback):
    """What another callback holds as the training starts, after all have been told so."""

    def __init__(self, watched: L.Callback) -> None:
        self.watched, self.state = watched, dict[str, Any]()

    def on_train_start(self, *rest: Any) -> None:
        self.state = self.watched.state_dict()


@pytest.mark.parametrize("name", KINDS)
def test_state_is_plain_and_resumes(
    name: str, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger, tmp_path: Path
) -> None:
    def fit(callback: L.Callback, max_steps: int, **settings: Any) -> tuple[L.Trainer, dict[str, Any]]:
        task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig("hierarchical", num_tiles=4)), lr_scheduler=None)
        recorder = StateAtStart(callback)
        settings_of_trainer = {"max_steps": max_steps, "val_check_interval": 1, "limit_val_batches": 1, "logger": tensorboard}
        is_checkpoint = isinstance(callback, Checkpoint)
        trainer = make_trainer(**settings_of_trainer, callbacks=[callback, recorder], enable_checkpointing=is_checkpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(task, text, **settings)
        return trainer, recorder.state

    L.seed_everything(0)
    fresh = MAKERS[name]().state_dict()
    trainer, _ = fit(MAKERS[name](), 3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].get(name, {})
    assert (not is_equal(stored, fresh)) == (name in STATEFUL)
    _, resumed = fit(MAKERS[name](), 4, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert is_equal(resumed, stored)


@pytest.mark.parametrize("name", sorted(set(KINDS) - ADDED_BY_TRIX))
def test_the_example_of_the_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mark, example = (inspect.getdoc(KINDS[name]) or "").partition("Example::\n")
    assert mark, f"the docstring of {name} must end with an example"
    assert f"- class_path: {name}\n" in example
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SENTENCE * 30)
    Path("example.yaml").write_text(dedent(example))
    Path("small.yaml").write_text(SMALL)
    assert main(["fit", "--config", "small.yaml", "--config", "example.yaml", "--trainer.fast_dev_run=1"]) == 0


SMALL = """
model:
  class_path: LanguageModelTask
  init_args:
    network: {d_model: 16, num_layers: 2, n_heads: 2, context_length: 8, ffn: {num_tiles: 4}}
data:
  class_path: TextDataModule
  init_args: {path: text.txt, context_length: 8, batch_size: 5, batches_per_epoch: 4}
trainer: {accelerator: cpu, max_steps: 2, logger: false, enable_checkpointing: false}
"""


def test_a_callback_without_an_example_is_one_that_trix_adds() -> None:
    for name in ADDED_BY_TRIX:
        assert "``trix`` adds it to every ``fit``" in (inspect.getdoc(KINDS[name]) or "")


def private_uses(code: str) -> list[str]:
    """Private attributes of anything but oneself and one's base class, as `line: text`."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "super()")
    ]


def test_callbacks_reach_into_no_private_attribute() -> None:
    found = {path.name: private_uses(path.read_text()) for path in Path(callbacks.__path__[0]).glob("*.py")}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("code", "is_private"),
    [("trainer._results", True), ("self.trainer._results", True), ("self._state", False), ("super()._name()", False)],
)
def test_the_rule_against_private_attributes_sees_them(code: str, is_private: bool) -> None:
    assert bool(private_uses(code)) == is_private
