"""The texts that language models train on: from the standard library, from a file, or downloaded and checked."""

import hashlib
import importlib
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_modules.errors import DataError
from trix.regular_files import read_regular
from trix.whole_file import whole_file

CorpusName = Literal["pydoc", "tinyshakespeare", "wikitext-2"]
CORPUS_NAMES: tuple[str, ...] = get_args(CorpusName)

DATA_DIR_VARIABLE = "TRIX_DATA_DIR"

# Python 3.11 to 3.13 have 79 topics of 373,000 to 415,000 characters without repetitions; far below that something is broken.
MIN_PYDOC_TOPICS = 60
MIN_PYDOC_CHARACTERS = 300_000
# Of a text file: a token takes 8 bytes.
MAX_TEXT_BYTES = 2**31
PARAGRAPH_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Corpus:
    """A text and how it is split.

    Attributes:
        source: how error texts name it.
        train_text: the text to train on; all of it when `validation_text` is None.
        validation_text: the validation text where the corpus has its own, else None.
        sha256: hex digest of the bytes the text came from (of the training file, then the validation file).
    """

    source: str
    train_text: str
    validation_text: str | None
    sha256: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of a public data set: its name below the data directory, its address and its checked content."""

    name: str
    url: str
    sha256: str


TINYSHAKESPEARE = RemoteFile(
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_WIKITEXT_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"
WIKITEXT_TEST = RemoteFile(
    "wikitext-2/test.txt",
    f"{_WIKITEXT_URL}/test.txt",
    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
)
WIKITEXT_VALID = RemoteFile(
    "wikitext-2/valid.txt",
    f"{_WIKITEXT_URL}/valid.txt",
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
)


def load_corpus(name: str) -> Corpus:
    """Load a named corpus.

    - `pydoc`: the help topics of the standard library (PSF licence), sorted by key, each paragraph once; needs no
      download, and differs between Python versions.
    - `tinyshakespeare`: 1,115,394 characters of Shakespeare (public domain).
    - `wikitext-2`: trained on test.txt and validated on valid.txt (1.3 and 1.1 MB, CC BY-SA). The training split
      of 10.8 MB is not used.

    Raises:
        DataError: the name is unknown, the text is not as expected, or the download failed.
    """
    if name == "pydoc":
        return _load_pydoc()
    if name == "tinyshakespeare":
        return load_file(fetch(TINYSHAKESPEARE))
    if name == "wikitext-2":
        train_bytes, validation_bytes = fetch(WIKITEXT_TEST).read_bytes(), fetch(WIKITEXT_VALID).read_bytes()
        sha256 = hashlib.sha256(train_bytes + validation_bytes).hexdigest()
        return Corpus("wikitext-2", train_bytes.decode(), validation_bytes.decode(), sha256)
    raise DataError(f"corpus ({name!r:.40}) must be one of {', '.join(CORPUS_NAMES)}")


def load_file(path: Path | str) -> Corpus:
    """Load any UTF-8 text file; a byte order mark is dropped, line ends stay as they are.

    Raises:
        DataError: the file is missing, no regular file, unreadable, above MAX_TEXT_BYTES, not UTF-8 or empty.
    """
    try:
        path = Path(path).expanduser()
        content = read_regular(path, MAX_TEXT_BYTES)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"text file {path} must be UTF-8: byte {byte:#04x} at {error.start} is not") from error
    except OSError as error:
        raise DataError(f"text file {path} cannot be read: {error.strerror or error}") from error
    except RuntimeError as error:  # no file can have that name: a home of nobody
        raise DataError(f"text file {str(path)!r} cannot be read: {error}") from error
    if not text:
        raise DataError(f"text file {path} is empty")
    return Corpus(str(path), text, None, hashlib.sha256(content).hexdigest())


def fetch(file: RemoteFile) -> Path:
    """Find `file` below TRIX_DATA_DIR where that is set, else in the cache, else download it; check its sha256.

    Raises:
        DataError: not in TRIX_DATA_DIR, other content than expected, or the download failed.
    """
    data_dir = os.environ.get(DATA_DIR_VARIABLE)
    if not data_dir:
        return _download(file)
    path = Path(data_dir).expanduser() / file.name
    try:
        sha256 = _sha256(path)
    except OSError as error:
        raise DataError(f"{DATA_DIR_VARIABLE} ({data_dir}) must hold {file.name}: {error.strerror or error}") from error
    if sha256 != file.sha256:
        raise DataError(f"sha256 of {path} ({sha256}) must be {file.sha256}")
    return path


def _download(file: RemoteFile) -> Path:
    import pooch  # takes 0.3 s to import, which only a download needs

    path = Path(pooch.os_cache("trix")) / file.name
    try:
        if path.is_file() and _sha256(path) == file.sha256:
            return path
        # Not pooch.retrieve: what it leaves where it is killed, nothing removes.
        with whole_file(path) as partial:
            pooch.get_logger().info("Downloading %s to %s.", file.url, path)
            pooch.HTTPDownloader(progressbar=True)(file.url, str(partial), None)
            sha256 = _sha256(partial)
            if sha256 != file.sha256:
                raise ValueError(f"its hash ({sha256}) must be {file.sha256}")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; another hash is a ValueError
        # Short, for a line is cut where it gets long, and the way out stands at its end.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", width=80)
        raise DataError(
            f"downloading {file.url} failed ({reason}); with the file at hand, save it as {file.name} in a folder "
            f"and set {DATA_DIR_VARIABLE} to that folder, or choose corpus pydoc, which needs no download"
        ) from error
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path, MAX_TEXT_BYTES)).hexdigest()


def _load_pydoc() -> Corpus:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"corpus pydoc needs pydoc_data.topics of the standard library, which this Python "
            f"({sys.version.split()[0]}) lacks: name a text file instead"
        ) from error
    if not isinstance(topics, dict) or not all(isinstance(item, str) for pair in topics.items() for item in pair):
        raise DataError(f"pydoc_data.topics.topics ({type(topics).__name__}) must be a dict of str to str")
    if len(topics) < MIN_PYDOC_TOPICS:
        raise DataError(f"number of pydoc topics ({len(topics)}) must be >= {MIN_PYDOC_TOPICS}")
    paragraphs = PARAGRAPH_SEPARATOR.join(topics[key] for key in sorted(topics)).split(PARAGRAPH_SEPARATOR)
    # A fifth of the text stands in several topics: kept, it would be trained on and validated on.
    text = PARAGRAPH_SEPARATOR.join(dict.fromkeys(paragraphs))
    if len(text) < MIN_PYDOC_CHARACTERS:
        raise DataError(f"number of pydoc characters ({len(text):,}) must be >= {MIN_PYDOC_CHARACTERS:,}")
    return Corpus("corpus pydoc", text, None, hashlib.sha256(text.encode()).hexdigest())
