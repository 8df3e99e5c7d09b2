"""Labelled texts as frames: CSV files, any text file, data sets of Kaggle."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trix.regular_files import read_regular

if TYPE_CHECKING:
    import pandas as pd

DELIMITERS = (";", ",", "\t")
MAX_FILE_BYTES = 2**32
SHUFFLE_SEED = 42
_KAGGLE_ID = re.compile(r"[\w-]+/[\w-]+", re.ASCII)
_INT = re.compile(r"-?\d{1,18}", re.ASCII)  # fits int64
_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")


def load_titles_csv(
    path: Path | str, text_col: str = "title", label_col: str = "topic", balance: bool | None = None
) -> "pd.DataFrame":
    """Texts and their classes from a CSV file in UTF-8, shuffled with a fixed seed.

    The delimiter (``;``, ``,`` or a tab) is the one by which the first line names both columns. Labels that are names become
    0, 1, ... in alphabetical order; ``frame.attrs["classes"]`` holds the names in this order. Labels that are ints stay.

    Args:
        balance: draw as many texts of each class as the smallest has; None: if there are two classes with names.

    Returns:
        A frame with the columns text_col (str) and label_col (int64).

    Raises:
        ValueError: no or several delimiters name the columns; a line with another number of fields; no rows; a label that is
            missing or a float; text that is not UTF-8. OSError: no regular file.
    """
    import pandas as pd

    text = _read_text(path)
    try:
        delimiter = _delimiter(text, text_col, label_col, path)
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise ValueError(f"{path} must be CSV: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"{path}: fields of row {number} ({len(row)}) must be as many as columns ({len(header)})")
    if not rows:
        raise ValueError(f"{path}: number of rows ({len(rows)}) must be >= 1")
    text_idx, label_idx = header.index(text_col), header.index(label_col)
    labels, classes = _numbered([row[label_idx] for row in rows], label_col, path)
    frame = pd.DataFrame({text_col: [row[text_idx] for row in rows], label_col: labels})
    if len(classes) == 2 if balance is None else balance:
        smallest = frame[label_col].value_counts().min()
        frame = frame.groupby(label_col).sample(n=smallest, random_state=SHUFFLE_SEED)
    frame = frame.sample(frac=1.0, random_state=SHUFFLE_SEED).reset_index(drop=True)
    frame.attrs["classes"] = classes
    return frame


def load_text(path: Path | str, text_col: str = "title", label_col: str = "topic") -> "pd.DataFrame":
    """The paragraphs of a text file in UTF-8, which blank lines divide, in order; all have the label 0.

    Raises:
        ValueError: no paragraph, or text that is not UTF-8. OSError: no regular file.
    """
    import pandas as pd

    paragraphs = [paragraph.strip() for paragraph in _PARAGRAPHS.split(_read_text(path))]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if not paragraphs:
        raise ValueError(f"{path}: number of paragraphs ({len(paragraphs)}) must be >= 1")
    return pd.DataFrame({text_col: paragraphs, label_col: [0] * len(paragraphs)})


def split_df(df: "pd.DataFrame", train: float = 0.8, seed: int = 42) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Two frames, the first with a share ``train`` of the rows, drawn with the seed; each row is in one of them.

    Raises:
        ValueError: train outside (0, 1), or either frame would be empty.
    """
    if not 0 < train < 1:
        raise ValueError(f"train ({train}) must be > 0 and < 1")
    number = round(train * len(df))
    if not 0 < number < len(df):
        raise ValueError(f"rows of the first part ({number}) must be >= 1 and < all rows ({len(df)})")
    shuffled = df.sample(frac=1.0, random_state=seed)
    return shuffled.iloc[:number].reset_index(drop=True), shuffled.iloc[number:].reset_index(drop=True)


def load_kaggle_dataset(
    dataset_id: str, filename: str | None = None, text_col: str = "title", label_col: str = "topic"
) -> "pd.DataFrame":
    """A CSV file of a data set of Kaggle, downloaded once, as :func:`load_titles_csv` reads it.

    Args:
        dataset_id: OWNER/NAME. filename: of the file within the data set; None: its only CSV file.

    Raises:
        ImportError: kagglehub is missing. ValueError: another form of either name, no such file, and as load_titles_csv.
    """
    if not _KAGGLE_ID.fullmatch(dataset_id):
        raise ValueError(f"dataset_id ({dataset_id!r}) must be OWNER/NAME")
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("data sets of Kaggle need kagglehub: pip install 'trix[kaggle]'") from error
    folder = Path(kagglehub.dataset_download(dataset_id))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv"))
    chosen = files if filename is None else [name for name in files if name == filename]
    if len(chosen) != 1:
        raise ValueError(f"filename ({filename!r}) must be one of the CSV files of {dataset_id}: {', '.join(files) or 'none'}")
    return load_titles_csv(folder / chosen[0], text_col, label_col)


def load_dataset_auto(
    path_or_kaggle: Path | str, filename: str | None = None, text_col: str = "title", label_col: str = "topic"
) -> "pd.DataFrame":
    """A file if there is one (.csv and .tsv as :func:`load_titles_csv`, others as :func:`load_text`), or else a data set of
    Kaggle.

    Raises:
        ValueError: neither a file nor OWNER/NAME, and as these.
    """
    path = Path(path_or_kaggle)
    if path.is_file():
        read = load_titles_csv if path.suffix.lower() in (".csv", ".tsv") else load_text
        return read(path, text_col, label_col)
    if not _KAGGLE_ID.fullmatch(str(path_or_kaggle)):
        raise ValueError(f"data ({path_or_kaggle}) must be a file, or OWNER/NAME of a data set of Kaggle")
    return load_kaggle_dataset(str(path_or_kaggle), filename, text_col, label_col)


def _read_text(path: Path | str) -> str:
    try:
        return read_regular(path, MAX_FILE_BYTES).decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def _delimiter(text: str, text_col: str, label_col: str, path: Path | str) -> str:
    headers = {mark: next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []) for mark in DELIMITERS}
    fitting = [mark for mark, header in headers.items() if header.count(text_col) == header.count(label_col) == 1]
    if len(fitting) != 1:
        columns = max(headers.values(), key=len)
        raise ValueError(f"{path}: columns ({', '.join(columns)}) must name {text_col} and {label_col} once each")
    return fitting[0]


def _numbered(labels: Sequence[str], label_col: str, path: Path | str) -> tuple[list[int], list[str]]:
    """Labels as ints; the names of the classes, none where they were ints."""
    kinds = [_kind(label) for label in labels]
    for number, (label, kind) in enumerate(zip(labels, kinds, strict=True), start=1):
        if kind not in ("int", "name"):
            raise ValueError(f"{path}: {label_col} of row {number} ({label!r}, {kind}) must be a name or an int")
        if kind != kinds[0]:
            first = f"{labels[0]!r}, {kinds[0]}"
            raise ValueError(f"{path}: {label_col} of row {number} ({label!r}, {kind}) must be of row 1's kind ({first})")
    if kinds[0] == "int":
        return [int(label) for label in labels], []
    classes = sorted(set(labels))
    number_of = {name: number for number, name in enumerate(classes)}
    return [number_of[label] for label in labels], classes


def _kind(label: str) -> str:
    if not label.strip():
        return "missing"
    if _INT.fullmatch(label):
        return "int"
    try:
        return "missing" if math.isnan(float(label)) else "a float"
    except ValueError:
        return "name"
