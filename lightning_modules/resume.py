"""``trix fit --resume RUN``: which checkpoint of a run to go on from, and with which configuration.

A run is a folder RUN with a ``version_N`` for each time it was started: there are its logs, its ``config.yaml`` and, in
``checkpoints``, what it wrote. Where ModelCheckpoint has a ``dirpath`` the checkpoints may be next to the logs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.commands.arguments import take_out
from lightning_modules.errors import UserError
from lightning_modules.run_folder import CHECKPOINTS_NAME, LAST, checkpoints, version, versions
from lightning_modules.tasks.checkpoint import check_resumable, read_checkpoint
from lightning_modules.tasks.task import CheckpointError

CONFIG_NAME = "config.yaml"
OPTION = "--resume"


class ResumedRun(NamedTuple):
    """The arguments of a command; config: the run's own configuration among them, which the user has not named."""

    arguments: list[str]
    config: Path | None = None


def resumed(arguments: list[str]) -> ResumedRun:
    """The arguments of a command, where ``--resume RUN`` has become ``--ckpt_path FILE``.

    Without a ``--config`` there is also one: the run's own. Other options override what it says.

    Raises:
        UserError: another command than fit, ``--ckpt_path`` as well, no run named; and as :func:`find_checkpoint`.
    """
    runs, rest = take_out(OPTION, arguments, f"a run folder or a checkpoint: {OPTION} RUN")
    if not runs:
        return ResumedRun(arguments)
    run = runs[-1]
    command, *rest = rest
    if command != "fit":
        raise UserError(f"{OPTION} is for `trix fit`; `trix {command}` takes --ckpt_path RUN")
    options = {argument.split("=")[0] for argument in rest}
    if "--ckpt_path" in options:
        raise UserError(f"{OPTION} and --ckpt_path both name where to go on: only one may be given")
    path, checkpoint = find_checkpoint(Path(run))
    config = None
    if not options & {"--config", "-c"}:
        folder = log_folder(path, checkpoint)
        if folder is None:
            raise UserError(f"{path}: its run has left no {CONFIG_NAME} there: --config FILE gives the configuration")
        config = folder / CONFIG_NAME
        rest = ["--config", str(config), *rest]
    return ResumedRun([command, *rest, "--ckpt_path", str(path)], config)


def find_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to go on from, and its content: `run` itself where it is a file; of a folder last.ckpt.

    Where last.ckpt is missing or cannot be loaded it is the newest other one that can, and a warning says so.

    Raises:
        UserError: there is nothing, or nothing that a training can go on from.
    """
    if run.is_file():
        return run, _resumable(run)
    if not run.is_dir():
        raise UserError(f"{OPTION} {run}: there is no such run folder or checkpoint")
    candidates = sorted(checkpoints(run), key=lambda path: not LAST.fullmatch(path.name))  # stable: each kind from new to old
    if not candidates:
        raise UserError(f"{OPTION} {run}: the folder holds no checkpoint (*.ckpt)")
    problems = [] if LAST.fullmatch(candidates[0].name) else [f"{run} holds no last.ckpt"]
    for path in candidates:
        try:
            checkpoint = _resumable(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            rank_zero_warn(f"{'; '.join(problems)}; going on from {path} (step {checkpoint['global_step']})")
        return path, checkpoint
    raise UserError(f"{OPTION} {run}: no checkpoint can be resumed from: {'; '.join(problems)}")


def log_folder(path: Path, checkpoint: Mapping[str, Any]) -> Path | None:
    """The folder of the logs of the run that wrote the checkpoint: the one with its config.yaml; None where there is none.

    It is the folder that holds the checkpoint's ``checkpoints``; else the version_N next to the file whose number the
    checkpoint holds, or the newest one there. A checkpoint's word counts for that number alone: it names no other folder.
    """
    named = checkpoint.get("callbacks", {}).get("RunRecord")
    name = named.get("folder") if isinstance(named, dict) else None
    places = versions(path.parent)
    if path.parent.name == CHECKPOINTS_NAME:
        places.insert(0, path.parent.parent)
    elif isinstance(name, str) and version(Path(name)) is not None:
        places.insert(0, path.parent / Path(name).name)
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


def _resumable(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    try:
        check_resumable(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint
