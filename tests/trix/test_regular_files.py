"""A file is read where it is a regular one of a bounded size; what else there is, is told without opening it."""

import os
import re
import stat
from pathlib import Path

import pytest

from trix.regular_files import check_regular, open_regular, read_regular


def test_the_bytes_of_a_file_are_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 7) == b"content"
    with open_regular(str(tmp_path / "file")) as file:
        assert file.read(3) == b"con"
    check_regular(tmp_path / "file")


def test_size_and_limit_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for read in (read_regular, open_regular, check_regular):
        with pytest.raises(OSError, match=re.escape("its size (7 bytes) must be <= 6")):
            read(tmp_path / "file", 6)


def test_missing_files_and_folders_are_what_open_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        check_regular(tmp_path)
    with pytest.raises(OSError, match="embedded null"):
        check_regular(f"{tmp_path}/a\0b")


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(OSError, match=f"it must be a regular file, not {kind}"):
            read_regular(path, 10)


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    status = (tmp_path / "file").stat()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "stat", lambda _: status)  # as it was a moment before
    assert stat.S_ISREG(Path(tmp_path / "pipe").stat().st_mode)
    with pytest.raises(OSError, match="it must be a regular file, not a pipe"):
        open_regular(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs files that the system makes up")
def test_a_file_that_holds_more_than_its_size_is_refused() -> None:
    with pytest.raises(OSError, match=re.escape("it must hold the bytes of its size (0), not more")):
        read_regular("/proc/version", 10**6)
