"""Where a run keeps its checkpoints: RUN/version_N/checkpoints, a version for each time it was started. Loads no torch."""

import re
from pathlib import Path

from lightning_modules.errors import UserError

CHECKPOINTS_NAME = "checkpoints"
BEST, LAST = re.compile(r"best(-v\d+)?\.ckpt"), re.compile(r"last(-v\d+)?\.ckpt")
_VERSION = re.compile(r"version_(\d+)")


def best_checkpoint(run: Path) -> Path:
    """The checkpoint that a command means by `run`: a path that is no folder as it is; of a run folder, or of one of its
    versions, best.ckpt, where there is none last.ckpt, else the newest.

    Raises:
        UserError: the folder holds no checkpoint.
    """
    if not run.is_dir():
        return run
    paths = checkpoints(run)
    if not paths:
        raise UserError(f"{run}: the folder holds no checkpoint (*.ckpt)")
    return max(paths, key=lambda path: (bool(BEST.fullmatch(path.name)), bool(LAST.fullmatch(path.name)), _age(path)))


def checkpoints(run: Path) -> list[Path]:
    """The folder's own, from new to old; where it has none, those of the newest of its versions that has any."""
    folders = [run, *versions(run)]
    groups = ([*folder.glob("*.ckpt"), *folder.glob(f"{CHECKPOINTS_NAME}/*.ckpt")] for folder in folders)
    found = next((group for group in groups if group), [])
    return sorted(found, key=_age, reverse=True)


def versions(run: Path) -> list[Path]:
    """The folders of its starts, the newest first."""

    def number(folder: Path) -> int:
        found = version(folder)
        return -1 if found is None else found

    return sorted(run.glob("version_*"), key=number, reverse=True)


def version(folder: Path) -> int | None:
    """N of a folder that is called version_N."""
    match = _VERSION.fullmatch(folder.name)
    return int(match[1]) if match else None


def _age(path: Path) -> tuple[int, str]:
    status = path.stat() if path.exists() else path.lstat()  # a link that leads nowhere
    return status.st_mtime_ns, path.name
