"""What `trix fit` costs beside a bare loop in torch: the same model, the same batches, the same weights at the end.

bare        forward, backward, clipping, AdamW, schedule; a validation every 125 steps, as configs/char_lm.yaml says
trainer     LanguageModelTask in a Trainer, nothing else
tensorboard ... with a logger; the rows after it with that logger and one thing more, as the configurations have it
trix fit    configs/char_lm.yaml with configs/callbacks/claims.yaml, as the command line runs it where there is no terminal:
            all monitors, logs, checkpoints

Each is a thread, of which one runs at a time: every --segment training steps, with the validations that fall due, it is the
next one's turn, in an order that moves on with every round. So a change of the machine's speed meets all alike. Ratios are
those of CPU time (that of the process, for writers have threads of their own), interval by interval of 125 steps; wall time
beside it. Making the objects is not measured. At the end all weights must be equal, bit for bit.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from turns import one_thread

from lightning_modules.callbacks import (
    ClaimMonitor,
    DiversityMonitor,
    LastCheckpoint,
    RoutingMonitor,
    RunRecord,
    StabilityMonitor,
)
from lightning_modules.data.text import TextDataModule
from lightning_modules.learning_rates import share_of_peak
from lightning_modules.lightning_cli import run_training_command
from lightning_modules.quiet import quiet_lightning
from lightning_modules.tasks import LanguageModelTask
from lightning_modules.tasks.task import default_lr_scheduler
from trix.nn import LanguageModel, LanguageModelConfig, routed_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENT, CLAIMS = CONFIGS / "char_lm.yaml", CONFIGS / "callbacks" / "claims.yaml"
LIMIT = 1.08


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--intervals", type=int, default=6, help="measured intervals (default: %(default)s)")
    parser.add_argument(
        "--interval", type=int, default=125, help="steps from one validation to the next (default: %(default)s)"
    )
    parser.add_argument("--segment", type=int, default=25, help="steps of a turn, a divisor of it (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WAYS, metavar="WAY", help=f"some of: {', '.join(WAYS)}")


def run(intervals: int, interval: int, segment: int, only: list[str] | None) -> list[dict[str, Any]]:
    if interval % segment:
        raise SystemExit(f"interval ({interval}) must be divisible by segment ({segment})")
    names = list(dict.fromkeys(["bare", *(only or WAYS)]))
    folder = Path.cwd()
    try:
        with tempfile.TemporaryDirectory() as temporary, quiet_lightning(), one_thread():
            os.chdir(temporary)  # where runs are left
            return measure(names, intervals, interval, segment)
    finally:
        os.chdir(folder)


class Turn(threading.Thread):
    """A way to train that halts before every `segment`-th batch until it is told to go on."""

    current = threading.local()

    def __init__(self, name: str, way: Callable[["Turn"], None], num_steps: int, interval: int, segment: int) -> None:
        super().__init__(name=name, daemon=True)
        self.way, self.num_steps, self.interval, self.segment = way, num_steps, interval, segment
        self.weights: dict[str, Tensor] = {}
        self.error: BaseException | None = None
        self._num_batches = 0
        self._may_go, self._has_halted = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        Turn.current.turn = self
        self._may_go.acquire()
        try:
            self.way(self)
        except BaseException as error:
            self.error = error
        finally:
            self._has_halted.release()

    def before_batch(self) -> None:
        # What is read after the training, for the report, is not measured.
        if self._num_batches < self.num_steps and self._num_batches % self.segment == 0:
            self._has_halted.release()
            self._may_go.acquire()
        self._num_batches += 1

    def take(self) -> tuple[float, float]:
        """Let it go on to its next halt, or its end: the seconds of CPU and of wall time that it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._may_go.release()
        self._has_halted.acquire()
        if self.error is not None:
            raise self.error
        return time.process_time() - cpu, time.perf_counter() - wall


class MeteredLoader:
    """A loader of TextDataModule that asks whether it is its turn."""

    def __init__(self, loader: Any, turn: Turn) -> None:
        self.loader, self.turn = loader, turn
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            self.turn.before_batch()
            yield batch


class MeteredText(TextDataModule):
    """TextDataModule; at the end of a run it hands on the weights."""

    def train_dataloader(self) -> Any:
        return MeteredLoader(super().train_dataloader(), Turn.current.turn)

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        Turn.current.turn.weights = dict(self.trainer.lightning_module.network.state_dict())


def train_bare(turn: Turn) -> None:
    data = MeteredText()
    torch.manual_seed(0)
    model = LanguageModel(data.vocab_size, LanguageModelConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = default_lr_scheduler(optimizer, turn.num_steps)
    train_loader, val_loader, step = data.train_dataloader(), data.val_dataloader(), 0
    while step < turn.num_steps:
        for token_BT, target_BT in train_loader:
            for layer in routed_layers(model):
                layer.router.step_factor.fill_(share_of_peak([optimizer]))
            logits, _, aux = model(token_BT, return_routing=True)
            loss = F.cross_entropy(logits.flatten(0, 1), target_BT.flatten()) + aux["total_aux"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % turn.interval == 0:
                validate(model, val_loader)
            if step == turn.num_steps:
                break
    turn.weights = dict(model.state_dict())


@torch.no_grad()
def validate(model: LanguageModel, loader: Any) -> float:
    model.eval()
    losses = [
        F.cross_entropy(model(token_BT).flatten(0, 1), target_BT.flatten(), reduction="sum") for token_BT, target_BT in loader
    ]
    model.train()
    return float(sum(losses)) / len(loader.dataset)


def train_with_trainer(turn: Turn, callbacks: Callable[[], list[L.Callback]] = list, has_logger: bool = True) -> None:
    data = MeteredText()
    torch.manual_seed(0)
    task = LanguageModelTask(data.vocabulary)
    settings = yaml.safe_load(EXPERIMENT.read_text())["trainer"]
    logger = TensorBoardLogger("trainer", turn.name, default_hp_metric=False) if has_logger else False
    settings |= {"logger": logger, "callbacks": callbacks(), "max_steps": turn.num_steps, "val_check_interval": turn.interval}
    trainer = L.Trainer(
        **settings,
        enable_checkpointing=turn.name == "checkpoints",
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(task, data)


def train_with_command(turn: Turn) -> None:
    arguments = ["fit", "--config", str(EXPERIMENT), "--config", str(CLAIMS), f"--data={__name__}.MeteredText"]
    settings = {"max_steps": turn.num_steps, "val_check_interval": turn.interval, "accelerator": "cpu"}
    run_training_command(arguments + [f"--trainer.{name}={value}" for name, value in settings.items()])


def checkpoints() -> list[L.Callback]:
    return [ModelCheckpoint(filename="best", monitor="val/loss"), LastCheckpoint()]


# What trains, by name; the monitors have the settings of the configurations.
WAYS: dict[str, Callable[[Turn], None]] = {
    "bare": train_bare,
    "trainer": partial(train_with_trainer, has_logger=False),
    "tensorboard": train_with_trainer,
    "metrics.csv": partial(train_with_trainer, callbacks=lambda: [RunRecord()]),
    "StabilityMonitor": partial(train_with_trainer, callbacks=lambda: [StabilityMonitor()]),
    "DiversityMonitor": partial(train_with_trainer, callbacks=lambda: [DiversityMonitor()]),
    "RoutingMonitor": partial(train_with_trainer, callbacks=lambda: [RoutingMonitor()]),
    "ClaimMonitor": partial(train_with_trainer, callbacks=lambda: [ClaimMonitor(max_classes=200)]),
    "checkpoints": partial(train_with_trainer, callbacks=checkpoints),
    "trix fit": train_with_command,
}


def measure(names: list[str], intervals: int, interval: int, segment: int) -> list[dict[str, Any]]:
    # One step more than is measured: what ends a run is not part of an interval.
    num_steps = intervals * interval + 1
    turns = [Turn(name, WAYS[name], num_steps, interval, segment) for name in names]
    results: list[dict[str, Any]] = [{"way": name, "cpu_s": [], "wall_s": []} for name in names]
    rounds = interval // segment
    with contextlib.redirect_stdout(io.StringIO()):
        for turn in turns:
            turn.start()
            turn.take()  # up to the first batch
        for round_idx in track(range(intervals * rounds), "rounds", console=Console(stderr=True)):
            start = round_idx % len(turns)
            for turn, result in [*zip(turns, results, strict=True)][start:] + [*zip(turns, results, strict=True)][:start]:
                for key, seconds in zip(("cpu_s", "wall_s"), turn.take(), strict=True):
                    result[key] += [0.0] if round_idx % rounds == 0 else []
                    result[key][-1] += seconds
        for turn in turns:
            turn.take()
            turn.join()
    check_same_work(turns)
    return [result | {"steps_of_an_interval": interval} for result in results]


def check_same_work(turns: list[Turn]) -> None:
    """All must have had the same batches and done the same with them."""
    expected = turns[0].weights
    for turn in turns:
        differing = [name for name, value in expected.items() if not torch.equal(value, turn.weights[name])]
        if differing or turn.weights.keys() != expected.keys():
            raise RuntimeError(f"the weights of {turn.name} must equal those of {turns[0].name}: {', '.join(differing)} differ")


def ratios(results: list[dict[str, Any]], result: dict[str, Any], key: str) -> tuple[float, float, float]:
    """Median and quartiles of the ratios to the bare loop, interval by interval."""
    values = [a / b for a, b in zip(result[key], results[0][key], strict=True)]
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), low, high


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| training | CPU ms a step | / bare (quartiles) | wall ms a step | / bare (quartiles) |", "|---" * 5 + "|"]
    for result in results:
        cells = []
        for key in ("cpu_s", "wall_s"):
            milliseconds = 1e3 * statistics.median(result[key]) / result["steps_of_an_interval"]
            median, low, high = ratios(results, result, key)
            cells.append(f"{milliseconds:.1f} | {median:.3f} ({low:.3f} to {high:.3f})")
        rows.append(f"| {result['way']} | {' | '.join(cells)} |")
    for result in results:
        if result["way"] == "trix fit":
            median = ratios(results, result, "cpu_s")[0]
            rows.append(f"\ntrix fit / bare: {median:.3f}, <= {LIMIT}: {'yes' if median <= LIMIT else 'no'}")
    return "\n".join(rows)
