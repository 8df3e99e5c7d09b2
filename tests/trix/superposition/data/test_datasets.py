"""Labelled texts from files: delimiters, labels, balance, splits, paragraphs."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dumps import trix_backend

from trix.superposition.data import (
    collate_texts,
    load_dataset_auto,
    load_kaggle_dataset,
    load_text,
    load_titles_csv,
    split_df,
)


def write(folder: Path, text: str, name: str = "titles.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def rows(frame: Any) -> set[tuple[str, int]]:
    return set(zip(frame["title"], frame["topic"], strict=True))


@pytest.mark.parametrize("mark", [";", ",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_delimiter_is_the_one_that_names_the_columns(mark: str, encoding: str, tmp_path: Path) -> None:
    lines = ["topic,x;y|title", 'WORLD|"a;b,c"', "SPORT|Füße", "TECH|", "SPORT|NA"]
    text = "\r\n".join([f"topic{mark}title", *lines[1:]]).replace("|", mark) + "\r\n\r\n"
    frame = load_titles_csv(write(tmp_path, text, encoding=encoding))
    assert rows(frame) == {("a;b,c", 2), ("Füße", 0), ("", 1), ("NA", 0)}
    assert frame.attrs["classes"] == ["SPORT", "TECH", "WORLD"]
    assert frame["topic"].dtype == "int64"
    assert list(frame.columns) == ["title", "topic"]


def test_two_named_classes_are_balanced_unless_told_otherwise(tmp_path: Path) -> None:
    text = "title,topic\n" + "".join(f"t{n},{'SPORT' if n % 5 == 0 else 'OTHER'}\n" for n in range(50))
    path = write(tmp_path, text)
    assert load_titles_csv(path)["topic"].value_counts().to_dict() == {0: 10, 1: 10}
    assert load_titles_csv(path, balance=False)["topic"].value_counts().to_dict() == {0: 40, 1: 10}
    assert len(set(load_titles_csv(path)["title"])) == 20
    ints = write(tmp_path, text.replace("SPORT", "1").replace("OTHER", "0"), "ints.csv")
    assert load_titles_csv(ints)["topic"].value_counts().to_dict() == {0: 40, 1: 10}
    assert load_titles_csv(ints, balance=True)["topic"].value_counts().to_dict() == {0: 10, 1: 10}


def test_rows_are_shuffled_always_alike_and_keep_their_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "title;topic\n" + "".join(f"t{n};{n}\n" for n in range(100)))
    frame = load_titles_csv(path)
    assert rows(frame) == {(f"t{n}", n) for n in range(100)}
    assert frame["topic"].tolist() != sorted(frame["topic"])
    assert frame.equals(load_titles_csv(path))
    assert frame.index.tolist() == list(range(100))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("title,topic\na,SPORT\nb,\n", r"topic of row 2 \('', missing\) must be a name or an int"),
        ("title,topic\na,SPORT\nb,nan\n", r"topic of row 2 \('nan', missing\) must be a name or an int"),
        ("title,topic\na,1\nb,2\nc,2.0\n", r"topic of row 3 \('2.0', a float\) must be a name or an int"),
        ("title,topic\na,1\nb,SPORT\n", r"topic of row 2 \('SPORT', name\) must be of row 1's kind \('1', int\)"),
        ("title,topic\na,SPORT,x\n", r"fields of row 1 \(3\) must be as many as columns \(2\)"),
        ("title,topic\na,SPORT\nb\n", r"fields of row 2 \(1\) must be as many as columns \(2\)"),
        ("title,topic\n", r"number of rows \(0\) must be >= 1"),
        ("title,subject\na,b\n", r"columns \(title, subject\) must name title and topic once each"),
        ("title,topic,topic\na,b,c\n", r"columns \(title, topic, topic\) must name"),
        ("", r"columns \(\) must name title and topic once each"),
        ('title,topic\n"' + "a" * 140000 + '",b\n', "must be CSV: field larger than field limit"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"titles\.csv.*" + problem):
        load_titles_csv(write(tmp_path, text))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be UTF-8: byte 12 is 0xfc"):
        load_titles_csv(write(tmp_path, "title,topic\nü,a\n", encoding="latin-1"))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    for read in (load_titles_csv, load_text):
        with pytest.raises(IsADirectoryError):
            read(tmp_path)


@settings(max_examples=20, deadline=None)
@given(number=st.integers(2, 60), train=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_a_split_is_a_partition_by_the_seed(number: int, train: float, seed: int) -> None:
    frame = pd.DataFrame({"title": [f"t{n}" for n in range(number)], "topic": range(number)})
    if not 0 < round(train * number) < number:
        with pytest.raises(ValueError, match=f"must be >= 1 and < all rows \\({number}\\)"):
            split_df(frame, train, seed)
        return
    first, second = split_df(frame, train, seed)
    assert len(first) == round(train * number)
    assert rows(first) | rows(second) == rows(frame)
    assert len(first) + len(second) == number
    assert first.equals(split_df(frame, train, seed)[0])
    assert second.index.tolist() == list(range(len(second)))


def test_a_split_needs_a_share_between_0_and_1() -> None:
    with pytest.raises(ValueError, match=r"train \(1.0\) must be > 0 and < 1"):
        split_df(pd.DataFrame({"title": ["a", "b"], "topic": [0, 1]}), train=1.0)


def test_paragraphs_of_a_text_are_its_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "\n\nOne\nline more\n \n\tTwo\n\n\n\nThree", "book.txt")
    frame = load_text(path)
    assert frame["title"].tolist() == ["One\nline more", "Two", "Three"]
    assert frame["topic"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"number of paragraphs \(0\) must be >= 1"):
        load_text(write(tmp_path, "\n \n", "empty.txt"))


def test_a_path_is_read_by_its_kind(tmp_path: Path) -> None:
    table = write(tmp_path, "title\ttopic\na\tX\nb\tY\n", "titles.tsv")
    assert rows(load_dataset_auto(table)) == {("a", 0), ("b", 1)}
    assert load_dataset_auto(str(write(tmp_path, "a\n\nb", "notes.md")))["title"].tolist() == ["a", "b"]
    for missing in ("missing.csv", "folder/missing.csv"):
        with pytest.raises(ValueError, match=rf"data \({missing}\) must be a file, or OWNER/NAME"):
            load_dataset_auto(missing)
    with pytest.raises(ValueError, match=r"data \(.*/a/b\) must be a file, or OWNER/NAME"):
        load_dataset_auto(tmp_path / "a" / "b")


def test_kaggle_is_asked_for_the_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "title;topic\na;X\nb;Y\n", "news.csv")
    asked = []

    def download(dataset_id: str) -> str:
        asked.append(dataset_id)
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))
    assert rows(load_dataset_auto("owner/topic-labeled-news")) == {("a", 0), ("b", 1)}
    assert asked == ["owner/topic-labeled-news"]
    write(tmp_path, "title;topic\nc;X\nd;Y\n", "more.csv")
    assert rows(load_kaggle_dataset("owner/news", "more.csv")) == {("c", 0), ("d", 1)}
    for filename in (None, "other.csv", "../news.csv"):
        with pytest.raises(ValueError, match=r"must be one of the CSV files of owner/news: more.csv, news.csv"):
            load_kaggle_dataset("owner/news", filename)
    with pytest.raises(ValueError, match=r"dataset_id \('../news'\) must be OWNER/NAME"):
        load_kaggle_dataset("../news")


def test_kaggle_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(ImportError, match=r"need kagglehub: pip install 'trix\[kaggle\]'"):
        load_kaggle_dataset("owner/news", "news.csv")


def test_texts_are_collated_by_the_backend() -> None:
    assert collate_texts(["abc", "d"], trix_backend(), 2)["input_ids"].tolist() == [[0, 1], [3, 0]]
