"""What is read of the processor and of the source tree."""

import subprocess
from pathlib import Path

import pytest

from lightning_modules.machine import cpu_name, git_state, instruction_sets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu sse4_2 fma avx2 avx512_vnni avxs?\n", ["avx2", "avx512_vnni", "fma", "sse4_2"]),
        ("Features\t: fp asimd asimddp sve2 aes\n", ["asimd", "asimddp", "sve2"]),
        ("processor : 0\n", []),
    ],
)
def test_instruction_sets_are_read(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert instruction_sets(tmp_path / "cpuinfo") == expected
    assert instruction_sets(tmp_path / "missing") == []


def test_the_name_of_the_processor_is_that_of_the_first_core(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model\t\t: 7\nmodel name\t: Fast: 2 GHz\n\nmodel name\t: Other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Fast: 2 GHz"
    assert cpu_name(tmp_path / "missing")


def test_git_state_is_the_commit_and_whether_tracked_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    (tmp_path / "untracked").touch()
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "is_dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "is_dirty": True}
