"""``trix runs``: what was trained below a folder, how far, how well, and where its checkpoints are. Loads no torch."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.commands.arguments import CommandParser
from lightning_modules.commands.output_text import print_rich
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError
from lightning_modules.run_folder import version
from trix.regular_files import check_regular

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVENT_FILES = "events.out.tfevents.*"
LOSS = "val/loss"
MAX_EVENT_BYTES = 2**31  # of one of TensorBoard's files
SHOWN_STAGES = ("val/", "test/")


@dataclass(frozen=True)
class Metric:
    """A metric over a run: its last value, and its bounds (NaN where it never was a number)."""

    last: float
    min: float
    max: float


@dataclass(frozen=True)
class Run:
    """What one folder of TensorBoard files says.

    name: the folder that holds the versions, relative to the one that was asked about. version: None where the folder is not
    called version_N. start: when the first event was written, None without events. step: the last one logged, counted from 0.
    """

    name: str
    version: int | None
    folder: Path
    start: datetime | None
    step: int | None
    metrics: dict[str, Metric]
    checkpoints: list[Path]


def run_runs(arguments: list[str]) -> int:
    """Print the table, or the JSON."""
    options = make_parser().parse_strictly(arguments)
    if options.descending and options.sort is None:
        raise UserError("--descending needs a metric to sort by: --sort METRIC")
    runs = find_runs(Path(options.folder))
    if options.sort is not None:
        runs = sort_runs(runs, options.sort, options.descending)
    if options.json:
        print(json.dumps([as_json(run) for run in runs], indent=2))
    else:
        _print(runs, options.sort or LOSS, options.descending)
    return 0


def find_runs(root: Path) -> list[Run]:
    """The runs below a folder, in the order in which they began.

    Raises:
        UserError: there is no such folder, no run below it, or files of a run that TensorBoard cannot read.
    """
    if not root.is_dir():
        rule = "be a folder, not a file" if root.exists() else "exist: `trix fit` makes one for its runs"
        raise UserError(f"folder {root} must {rule}")
    folders = sorted({path.parent for path in root.rglob(EVENT_FILES)})
    if not folders:
        raise UserError(f"folder {root} must hold a run: there are no TensorBoard files ({EVENT_FILES}) below it")
    runs = sorted((_read(folder, root) for folder in folders), key=_by_start)
    for path in sorted(root.rglob("*.ckpt")):
        owner = _owner(path, runs) if path.exists() else None  # not for a link that leads nowhere
        if owner is not None:
            owner.checkpoints.append(path)
    return runs


def sort_runs(runs: Sequence[Run], metric: str, is_descending: bool) -> list[Run]:
    """By the lowest value of a metric, lowest first; descending: by the highest, highest first. Runs without it come last.

    Raises:
        UserError: no run has the metric.
    """
    names = sorted({name for run in runs for name in run.metrics})
    if metric not in names:
        known = "; there are: " + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"--sort ({metric}) must be a metric of a run{did_you_mean(metric, names) or known}")

    def key(run: Run) -> float:
        best = _best(run, metric, is_descending)
        return math.inf if math.isnan(best) else -best if is_descending else best

    return sorted(runs, key=key)


def as_json(run: Run) -> dict[str, Any]:
    """A value that is no finite number is null: JSON has no other word for it."""
    return {
        "name": run.name,
        "version": run.version,
        "folder": str(run.folder),
        "start": None if run.start is None else run.start.isoformat(timespec="seconds"),
        "step": run.step,
        "metrics": {
            name: {part: _finite(value) for part, value in vars(metric).items()} for name, metric in run.metrics.items()
        },
        "checkpoints": [str(path) for path in run.checkpoints],
    }


def _read(folder: Path, root: Path) -> Run:
    events = _events(folder)
    scalars = {tag: values for tag in events.Tags()["scalars"] if (values := events.Scalars(tag))}  # steps back delete values
    try:
        start = datetime.fromtimestamp(events.FirstEventTimestamp()).astimezone()
    except (ValueError, OverflowError, OSError):  # no events, or a time that no calendar has
        start = None
    top, place = root.resolve(), folder.resolve()
    number = version(place)
    place = place if number is None else place.parent
    return Run(
        name=str(place.relative_to(top)) if top in place.parents else place.name,
        version=number,
        folder=folder,
        start=start,
        step=max((event.step for values in scalars.values() for event in values), default=None),
        metrics={tag: _metric([event.value for event in values]) for tag, values in sorted(scalars.items())},
        checkpoints=[],
    )


def _events(folder: Path) -> "EventAccumulator":
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Scalars are all kept, of everything else one value: 0 would mean all.
    kept = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1, "tensors": 1}
    try:
        for path in folder.glob("*tfevents*"):  # all that tensorboard opens
            check_regular(path, MAX_EVENT_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return EventAccumulator(str(folder), size_guidance=kept).Reload()
    except Exception as error:  # tensorboard reads a file of events cut short, but not one of other bytes
        raise UserError(f"{folder}: tensorboard cannot read its {EVENT_FILES}: {type(error).__name__}: {error}") from error


def _metric(values: Sequence[float]) -> Metric:
    numbers = [value for value in values if not math.isnan(value)] or [math.nan]
    return Metric(last=values[-1], min=min(numbers), max=max(numbers))


def _owner(ckpt: Path, runs: Sequence[Run]) -> Run | None:
    """The run whose folder holds the checkpoint; of the versions next to it, the last that had begun when it was written."""
    inside = [run for run in runs if run.folder in ckpt.parents]
    if inside:
        return max(inside, key=lambda run: len(run.folder.parts))
    others = [run for run in runs if run.version is not None and run.folder.parent == ckpt.parent]
    begun = [run for run in others if run.start is not None and run.start.timestamp() <= ckpt.stat().st_mtime]
    return next(reversed(begun or others), None)


def _by_start(run: Run) -> tuple[float, str, int]:
    return (math.inf if run.start is None else run.start.timestamp(), run.name, run.version or 0)


def _best(run: Run, metric: str, is_descending: bool) -> float:
    if metric not in run.metrics:
        return math.nan
    return run.metrics[metric].max if is_descending else run.metrics[metric].min


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(runs: Sequence[Run], metric: str, is_descending: bool) -> None:
    """One line a run: best and last value of one metric, the last values of what else was measured on held-out data."""
    from rich.table import Table
    from rich.text import Text

    names = {name for run in runs for name in run.metrics}
    others = sorted(name for name in names if name.startswith(SHOWN_STAGES) and name != metric)
    table = Table(box=None, pad_edge=False)
    extreme = "highest" if is_descending else "lowest"
    numbers = ["version", "last step", f"{extreme} {metric}", f"last {metric}", *(f"last {name}" for name in others)]
    for name in ("run", numbers[0], "began", *numbers[1:], "checkpoints"):
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for run in runs:
        last = [run.metrics[name].last if name in run.metrics else None for name in (metric, *others)]
        best = _best(run, metric, is_descending) if metric in run.metrics else None
        cells = (
            run.name,
            "-" if run.version is None else f"{run.version}",
            "-" if run.start is None else f"{run.start:%Y-%m-%d %H:%M}",
            "-" if run.step is None else f"{run.step}",
            *("-" if value is None else f"{value:.4g}" for value in (best, *last)),
            _joined(run.checkpoints),
        )
        table.add_row(*map(Text, cells))
    print_rich(lambda console: console.print(table))


def _joined(paths: Iterable[Path]) -> str:
    return " ".join(map(str, paths)) or "-"


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix runs",
        description="List the runs below a folder, in the order in which they began: last step, metrics, checkpoints.\n"
        "Checkpoints next to several versions of a run are those of the last one that had begun when they were written.",
        epilog="examples:\n  trix runs\n  trix runs runs/digits --sort val/accuracy --descending\n  trix runs --json",
    )
    parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: %(default)s)")
    parser.add_argument("--sort", metavar="METRIC", help="sort by the lowest value of a metric, lowest first")
    parser.add_argument("--descending", action="store_true", help="sort by the highest value, highest first")
    parser.add_argument("--json", action="store_true", help="print JSON: the last, lowest and highest value of every metric")
    return parser
