"""The folder in which a run leaves what it writes, and how it is said to people."""

from pathlib import Path

import lightning as L


def local_log_folder(trainer: L.Trainer) -> Path | None:
    """That of the run's logs; None where it has none on this machine, or is a trial (fast_dev_run).

    It is that of the first process, on all of them: every one has to ask.
    """
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = trainer.log_dir
    return None if folder is None or "://" in folder else Path(folder)


def relative_path(path: Path | str) -> str:
    """As short as it can be said from the working folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
