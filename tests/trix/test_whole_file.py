"""Files are written whole or not at all, and what a killed writer leaves is removed by the next one."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trix import whole_file as module
from trix.whole_file import remove_abandoned, remove_unless_used, whole_file, whole_files, whole_folder, write_whole

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
# Half-way through a file it says so, waits for a line, and ends it; or dies, where the line is missing.
WRITER = """
import os, signal, sys
from pathlib import Path
from trix.whole_file import whole_file
with whole_file(Path("a.bin")) as partial:
    partial.write_bytes(b"half")
    print("half", flush=True)
    if not sys.stdin.readline():
        os.kill(os.getpid(), signal.SIGKILL)
    partial.write_bytes(b"whole")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_writer(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with whole_file(path) as partial:
        partial.write_bytes(b"content")
        assert names(path.parent) == [partial.name]
    assert names(path.parent) == ["a.bin"]
    assert path.read_bytes() == b"content"
    write_whole(b"other", path)
    assert path.read_bytes() == b"other"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with whole_file(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_the_name_and_the_name_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.replace

    def record_sync(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        events.append("sync folder" if is_folder else f"sync file of {os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    write_whole(b"content", tmp_path / "a.bin")
    assert events == ["sync file of 7 bytes", "rename", "sync folder"]


def test_what_a_killed_writer_leaves_the_next_one_removes(tmp_path: Path) -> None:
    process = start_writer(tmp_path)
    process.communicate()  # without a line
    assert process.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".a.bin.")
    write_whole(b"other", tmp_path / "b.bin")
    assert names(tmp_path) == ["b.bin"]


def test_what_a_live_writer_writes_is_left_alone(tmp_path: Path) -> None:
    process = start_writer(tmp_path)
    write_whole(b"other", tmp_path / "a.bin")
    assert len(names(tmp_path)) == 2
    process.communicate("go on\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"whole"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as first:
        first.write_bytes(b"first")
        with whole_file(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


def test_nothing_but_temporary_files_is_removed(tmp_path: Path) -> None:
    kept = ["a.bin", ".a.bin.1.partial", "a.bin.1.0123abcd.partial", ".a.bin.x.0123abcd.partial", ".a.1.0123abcd.partial.txt"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / ".to_folder.1.0123abcd.partial").symlink_to("folder")
    (tmp_path / ".link.1.0123abcd.partial").symlink_to("a.bin")
    os.mkfifo(tmp_path / ".pipe.1.0123abcd.partial")
    before = names(tmp_path)
    (tmp_path / ".a.bin.1.0123abcd.partial").touch()
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before
    remove_abandoned(tmp_path / "missing")


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.secrets, "token_hex", lambda num_bytes: "00" * num_bytes)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.bin.{os.getpid()}.00000000.partial").symlink_to("precious")
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.bin"):
        write_whole(b"content", tmp_path / "a.bin")
    assert names(tmp_path) == before
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = module.fcntl.flock, []

    def remove_and_lock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", remove_and_lock)
    write_whole(b"content", tmp_path / "a.bin")
    assert len(removed) == 1
    assert names(tmp_path) == ["a.bin"]


def test_a_disk_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    foreign = tmp_path / ".a.bin.1.0123abcd.partial"  # whose writer may live
    foreign.touch()
    write_whole(b"content", tmp_path / "a.bin")
    assert names(tmp_path) == [foreign.name, "a.bin"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "fault"), [(Path, "write_bytes", full_disk), (os, "fsync", full_disk), (Path, "replace", full_disk)]
)
def test_a_file_that_cannot_be_written_is_named(
    owner: object, name: str, fault: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(b"content", path)
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert names(tmp_path) == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("not a folder")
    with pytest.raises(OSError, match=r"exists|Not a directory") as caught:
        write_whole(b"content", tmp_path / "a" / "b.bin")
    assert caught.value.filename == str(tmp_path / "a" / "b.bin")


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "a.bin"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")
    assert names(tmp_path) == []


def write_pair(folder: Path, content: bytes, error: BaseException | None = None) -> None:
    """A file that holds the name of another one, which is named by its content."""
    other = folder / f"a.{content.decode()}"
    with whole_files(other, folder / "a") as (partial_other, partial):
        partial_other.write_bytes(content)
        partial.write_text(other.name)
        if error is not None:
            raise error


def content_of_pair(folder: Path) -> bytes:
    return (folder / (folder / "a").read_text()).read_bytes()


def test_files_that_belong_together_are_written_together(tmp_path: Path) -> None:
    for content in (b"first", b"second", b"first"):
        write_pair(tmp_path, content)
        assert names(tmp_path)[0] == "a"
        assert content_of_pair(tmp_path) == content
    with pytest.raises(KeyboardInterrupt):
        write_pair(tmp_path, b"third", KeyboardInterrupt())
    assert content_of_pair(tmp_path) == b"first"
    assert names(tmp_path) == ["a", "a.first", "a.second"]


@pytest.mark.parametrize("num_done", range(2))
def test_a_file_keeps_its_parts_wherever_the_next_writer_stops(
    num_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, b"old")
    replace, num_calls = Path.replace, 0

    def replace_some(self: Path, target: Path) -> Path:
        nonlocal num_calls
        assert content_of_pair(tmp_path) == b"old"
        num_calls += 1
        if num_calls == num_done + 1:
            raise OSError(errno.EIO, "broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_some)
    with pytest.raises(OSError, match="broken"):
        write_pair(tmp_path, b"new")
    assert content_of_pair(tmp_path) == b"old"
    assert names(tmp_path) == ["a", *["a.new"] * num_done, "a.old"]


def test_two_writers_of_a_pair_do_not_mix_theirs(tmp_path: Path) -> None:
    with whole_files(tmp_path / "a.first", tmp_path / "a") as (other, partial):
        other.write_bytes(b"first")
        partial.write_text("a.first")
        write_pair(tmp_path, b"second")
        assert content_of_pair(tmp_path) == b"second"
    assert content_of_pair(tmp_path) == b"first"


def test_both_files_of_a_killed_writer_go(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from trix.whole_file import whole_files\n"
        "with whole_files(Path(sys.argv[1], 'a.data'), Path(sys.argv[1], 'a')): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, check=False)
    assert len(names(tmp_path)) == 2
    write_pair(tmp_path, b"next")
    assert names(tmp_path) == ["a", "a.next"]


def test_only_what_is_neither_used_nor_held_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.data"
    path.touch()
    remove_unless_used(path, lambda: True)
    with path.open("rb") as held:
        module.fcntl.flock(held, module.fcntl.LOCK_EX)
        remove_unless_used(path, lambda: False)
    assert names(tmp_path) == ["a.data"]
    remove_unless_used(path, lambda: False)
    assert names(tmp_path) == []


FOLDER_WRITER = WRITER.replace("whole_file", "whole_folder").replace("from trix.whole_folder", "from trix.whole_file")
FOLDER_WRITER = FOLDER_WRITER.replace('"a.bin"', '"a"').replace("partial.write_bytes", '(partial / "a.bin").write_bytes')


def start_folder_writer(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FOLDER_WRITER]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    with whole_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.bin").write_bytes(b"content")
        assert names(path.parent) == [partial.name]
    assert names(path.parent) == ["a"]
    assert (path / "inner" / "a.bin").read_bytes() == b"content"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_no_folder(error: type[BaseException], tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_folder(tmp_path / "a") as partial:
            (partial / "a.bin").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == []


def test_a_folder_with_content_is_not_replaced_and_an_empty_one_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    with whole_folder(path) as partial:
        (partial / "first.bin").touch()
    assert names(path) == ["first.bin"]
    with pytest.raises(OSError, match="a") as failure, whole_folder(path) as partial:
        (partial / "second.bin").touch()
    assert failure.value.filename == str(path)
    assert (names(tmp_path), names(path)) == (["a"], ["first.bin"])


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_folder_whose_files_cannot_be_written_is_named(is_copied: bool, tmp_path: Path) -> None:
    """Whichever file in it did not fit: a copy names its source first, which is not to blame."""

    def write(partial: Path) -> None:
        inner, source = str(partial / "inner" / "a.bin"), str(tmp_path / "source.bin")
        names_of_files = (source, None, inner) if is_copied else (inner,)
        raise OSError(errno.ENOSPC, "No space left on device", *names_of_files)

    with pytest.raises(OSError, match="No space left on device") as caught, whole_folder(tmp_path / "a") as partial:
        write(partial)
    assert caught.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == []


def test_a_link_and_a_path_without_a_name_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for path in (tmp_path / "link", Path("/"), Path()):
        with pytest.raises(OSError, match="must be a name for a new folder, not a link"), whole_folder(path):
            raise AssertionError("the block was entered")
    assert names(tmp_path) == ["link", "there"]


def test_an_error_about_a_file_outside_of_the_folder_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "a") as partial:
        (partial / "a.bin").write_bytes((tmp_path / "source.bin").read_bytes())
    assert caught.value.filename == str(tmp_path / "source.bin")
    assert names(tmp_path) == []


def test_a_killed_writer_of_a_folder_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    killed, alive = start_folder_writer(tmp_path), start_folder_writer(tmp_path)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    remove_abandoned(tmp_path)
    (left,) = names(tmp_path)
    assert str(alive.pid) in left
    alive.communicate("go on\n")
    assert alive.returncode == 0
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "a.bin").read_bytes() == b"whole"
