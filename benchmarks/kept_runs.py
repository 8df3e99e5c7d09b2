"""Runs of a case that are kept in a file as they finish, so that a case that was stopped goes on where it was."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def put_aside(path: Path) -> None:
    """Let a case begin anew: the runs that are there so far get another name, FILE.bak, or FILE.bak2 where that is taken."""
    if not path.exists():
        return
    names = (path.with_name(f"{path.name}.bak{number if number > 1 else ''}") for number in count(1))
    free = next(name for name in names if not name.exists())
    path.rename(free)
    print(f"runs of an earlier call are kept as {free}")


def kept_or_run(path: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result under this key in the file; where it holds none, it is computed and appended."""
    key = json.loads(json.dumps(key))  # tuples are lists there
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if record["key"] == key:
                return record["result"]
    result = compute()
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "result": result}) + "\n")
    return result
