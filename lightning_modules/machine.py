"""What a measurement depends on besides its settings: the processor, and the state of the source tree. Loads no torch."""

import os
import platform
import re
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What the arithmetic of torch, onnxruntime and our kernels looks at, as /proc/cpuinfo names it.
_INSTRUCTION_SETS = re.compile(r"sse4_2|avx\w*|fma|f16c|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The model; platform.processor() says no more than the architecture on Linux."""
    return _entry("model name", cpuinfo) or platform.processor() or platform.machine()


def instruction_sets(cpuinfo: Path = CPUINFO) -> list[str]:
    """Those of the first core; empty where the system does not tell."""
    return sorted(flag for flag in _entry("flags|Features", cpuinfo).split() if _INSTRUCTION_SETS.fullmatch(flag))


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """The commit that the folder is at, and whether tracked files differ from it; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "is_dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _entry(name: str, cpuinfo: Path) -> str:
    """What the first core says; empty where it says nothing, or there is no such file."""
    try:
        content = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^(?:{name})[ \t]*:(.*)$", content, re.MULTILINE)
    return found[1].strip() if found else ""


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or none that answers
        return None
    return result.stdout.strip() if result.returncode == 0 else None
