"""The text of plays: which files of the archive it is made of, and an archive that is another one."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plays


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    start, end = plays.MEMBERS
    files = {
        f"{start}b{end}": "\n\nB, a play\n",
        f"{start}a{end}": "A, a play\n\n\n",
        f"{start}a_gut_f.txt": "A, in another spelling",
        f"elsewhere/a{end}": "not a play",
    }
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            opened.addfile(info, io.BytesIO(text.encode()))
    return path


def test_the_text_is_each_play_once_in_the_order_of_their_names(archive: Path) -> None:
    assert plays.plays(archive) == b"A, a play\n\nB, a play\n"


def test_another_archive_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plays.txt"
    monkeypatch.setattr(sys, "argv", ["plays.py", str(archive), str(output)])
    with pytest.raises(SystemExit):
        plays.main()
    assert f") must be {plays.ARCHIVE_SHA256}" in capsys.readouterr().err
    assert not output.exists()
