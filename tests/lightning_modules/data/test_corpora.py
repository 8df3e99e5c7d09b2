"""Where texts come from: the standard library, files, TRIX_DATA_DIR and a checked download."""

import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pooch
import pytest

from lightning_modules.data import corpora
from lightning_modules.data.corpora import RemoteFile, fetch, load_corpus, load_file
from lightning_modules.error_text import one_line
from lightning_modules.errors import DataError, UserError

CONTENT = b"It was a bright cold day in April\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine that serves `tmp_path/served`, and an empty cache; yields the address."""

    class QuietHandler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    served = tmp_path / "served"
    served.mkdir()
    (served / "april.txt").write_bytes(CONTENT)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(corpora.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(served))) as http:
        thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def remote(server: str, name: str = "novels/april.txt", path: str = "april.txt", sha256: str = SHA256) -> RemoteFile:
    return RemoteFile(name, f"{server}/{path}", sha256)


def test_download_is_cached_below_the_name_and_not_repeated(server: str, tmp_path: Path) -> None:
    path = fetch(remote(server))
    assert path == tmp_path / "cache/trix/novels/april.txt"
    assert path.read_bytes() == CONTENT
    (tmp_path / "served/april.txt").unlink()
    assert fetch(remote(server)) == path


def test_missing_download_says_how_to_use_the_data_directory(server: str) -> None:
    with pytest.raises(
        DataError, match=r"downloading http.*/gone.txt failed \(HTTPError: 404.*novels/april.txt.*TRIX_DATA_DIR"
    ):
        fetch(remote(server, path="gone.txt"))


def test_download_of_other_content_is_refused_and_not_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"downloading .* failed \(ValueError: .*hash"):
        fetch(remote(server, sha256="0" * 64))
    assert not (tmp_path / "cache/trix/novels/april.txt").exists()


def test_unreachable_server_is_one_line(server: str) -> None:
    with pytest.raises(DataError, match=r"^downloading http://127.0.0.1:9/april.txt failed \(ConnectionError") as caught:
        fetch(remote("http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_failed_download_of_a_long_address_keeps_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("Max retries exceeded with url " + "and so on " * 60)

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", refuse)
    for file in (corpora.TINYSHAKESPEARE, corpora.WIKITEXT_TEST, corpora.WIKITEXT_VALID):
        with pytest.raises(DataError) as caught:
            corpora._download(file)
        assert one_line(caught.value) == str(caught.value)


def test_data_directory_comes_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corpora.DATA_DIR_VARIABLE, str(tmp_path))
    file = remote("http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"^TRIX_DATA_DIR \(.*\) must hold novels/april.txt: No such file"):
        fetch(file)
    path = tmp_path / "novels/april.txt"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(file) == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(DataError, match=rf"^sha256 of .*april.txt \([0-9a-f]{{64}}\) must be {SHA256}$"):
        fetch(file)


def test_wikitext_trains_on_test_and_validates_on_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(name: str, text: str) -> RemoteFile:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return RemoteFile(name, "", hashlib.sha256(text.encode()).hexdigest())

    monkeypatch.setenv(corpora.DATA_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(corpora, "WIKITEXT_TEST", stand_in("wikitext-2/test.txt", " = A title = "))
    monkeypatch.setattr(corpora, "WIKITEXT_VALID", stand_in("wikitext-2/valid.txt", " held out "))
    corpus = load_corpus("wikitext-2")
    assert (corpus.train_text, corpus.validation_text) == (" = A title = ", " held out ")
    assert corpus.sha256 == hashlib.sha256(b" = A title =  held out ").hexdigest()


def test_tinyshakespeare_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(CONTENT)
    monkeypatch.setenv(corpora.DATA_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE", RemoteFile("tinyshakespeare.txt", "", SHA256))
    corpus = load_corpus("tinyshakespeare")
    assert (corpus.train_text, corpus.validation_text, corpus.sha256) == (CONTENT.decode(), None, SHA256)


def test_pydoc_is_the_topics_in_key_order_each_paragraph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pydoc_data.topics")
    module.topics = {"b": "two\n\none", "a": "one\n\n three"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    monkeypatch.setattr(corpora, "MIN_PYDOC_TOPICS", 2)
    monkeypatch.setattr(corpora, "MIN_PYDOC_CHARACTERS", 1)
    corpus = load_corpus("pydoc")
    assert corpus.train_text == "one\n\n three\n\ntwo"
    assert corpus.validation_text is None
    assert corpus.sha256 == hashlib.sha256(corpus.train_text.encode()).hexdigest()


def test_validation_text_of_pydoc_does_not_stand_in_its_training_text() -> None:
    text = load_corpus("pydoc").train_text
    num_train = len(text) * 9 // 10
    train, windows = text[:num_train], [text[head : head + 64] for head in range(num_train, len(text), 64)]
    assert sum(window in train for window in windows) < 0.01 * len(windows)


@pytest.mark.parametrize(
    ("topics", "message"),
    [
        (None, r"^corpus pydoc needs pydoc_data.topics of the standard library, which this Python \(3"),
        (["assert"], r"^pydoc_data.topics.topics \(list\) must be a dict of str to str$"),
        ({"assert": 3}, r"^pydoc_data.topics.topics \(dict\) must be a dict of str to str$"),
        ({"assert": "text"}, r"^number of pydoc topics \(1\) must be >= 60$"),
        ({str(i): f"{i:010}" for i in range(60)}, r"^number of pydoc characters \(718\) must be >= 300,000$"),
    ],
)
def test_unexpected_pydoc_is_an_error(topics: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pydoc_data.topics")
    if topics is not None:
        module.topics = topics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    with pytest.raises(DataError, match=message):
        load_corpus("pydoc")


def test_absent_pydoc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"^corpus pydoc needs pydoc_data.topics .*: name a text file instead$"):
        load_corpus("pydoc")


def test_unknown_corpus_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"^corpus \('enwik8'\) must be one of pydoc, tinyshakespeare, wikitext-2$"):
        load_corpus("enwik8")


def test_file_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    content = b"\xef\xbb\xbfa\r\nb\n"
    path.write_bytes(content)
    corpus = load_file(path)
    assert corpus.train_text == "a\r\nb\n"
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 noir", r"^text file .*text.txt must be UTF-8: byte 0xe9 at 3 is not$"),
        (b"", r"^text file .*text.txt is empty$"),
    ],
)
def test_unusable_file_content_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_file(path)


def test_missing_file_and_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^text file .*absent.txt cannot be read: No such file or directory$"):
        load_file(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory$"):
        load_file(tmp_path)
