"""Translated texts: the message catalogues inside an installed Django, read as files; Django is never imported."""

import hashlib
import importlib.metadata
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_modules.errors import DataError

DISTRIBUTION = "Django"

# What is no language: the places of values, and markup. `%` before a space is a percentage.
_PLACEHOLDER = re.compile(r"%\(\w+\)(?:[\d.]*[a-z])?|%[\d.]*[a-z%]|\{\w*\}|<[^<>]*>")


class Translation(NamedTuple):
    """One text: its language (a code such as `pt_BR`), the English message that it translates, and what it says."""

    language: str
    message: str
    text: str


def installed_version() -> str:
    """The version of the installed Django.

    Raises:
        DataError: there is none.
    """
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"{DISTRIBUTION} must be installed, its translations are the data: pip install 'trix[data]'") from error


def load_translations(min_length: int) -> list[Translation]:
    """The texts of at least `min_length` characters in all languages, sorted.

    A text is in Unicode's NFC without placeholders (``%(name)s``, ``{}``) and markup, which are the same in every language. A
    text that was left in English counts for English alone; one that stands in several languages is none's, so it is left
    out; one that stands for several messages of a language is kept once, for the first of them.

    Raises:
        DataError: Django or babel is not installed, or the installed Django holds no translations.
    """
    first: dict[tuple[str, str], str] = {}
    for language, message, text in sorted(_without_english(_read_catalogues())):
        text = plain_text(text)
        if len(text) >= min_length:
            first.setdefault((language, text), message)
    languages: defaultdict[str, set[str]] = defaultdict(set)
    for language, text in first:
        languages[text].add(language)
    found = [Translation(language, message, text) for (language, text), message in first.items() if len(languages[text]) == 1]
    if not found:
        raise DataError(f"number of translations in {DISTRIBUTION} {installed_version()} (0) must be >= 1")
    return sorted(found)


def plain_text(text: str) -> str:
    """The text in NFC with a space in place of each placeholder, tag and run of white space, and none at its ends."""
    return " ".join(_PLACEHOLDER.sub(" ", unicodedata.normalize("NFC", text)).split())


def part_of(message: str, seed: int) -> float:
    """Where a message stands in [0, 1), by a hash of it and the seed: the same in all languages and on every machine."""
    digest = hashlib.blake2b(f"{seed}:{message}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def digest_of(translations: Iterable[Translation]) -> str:
    """sha256 hex digest of the texts in order, with their languages and messages."""
    sha256 = hashlib.sha256()
    for translation in translations:
        sha256.update("\0".join((*translation, "")).encode())
    return sha256.hexdigest()


def _read_catalogues() -> Iterator[Translation]:
    """Every translated text, each plural form for itself."""
    try:
        from babel.messages.mofile import read_mo
    except ImportError as error:
        raise DataError("babel must be installed, it reads the translations: pip install 'trix[data]'") from error
    installed_version()
    for path in importlib.metadata.files(DISTRIBUTION) or ():
        if path.suffix != ".mo" or path.parts[-4] != "locale":  # locale/LANGUAGE/LC_MESSAGES/NAME.mo
            continue
        with Path(path.locate()).open("rb") as file:
            catalogue = read_mo(file)
        for message in catalogue:
            if message.id:  # the one without is the header
                message_id = message.id if isinstance(message.id, str) else message.id[0]
                texts = [message.string] if isinstance(message.string, str) else message.string or []
                yield from (Translation(path.parts[-3], message_id, text) for text in texts)


def _without_english(translations: Iterable[Translation]) -> Iterator[Translation]:
    """Without the texts that are the message itself, except in the kinds of English."""
    for translation in translations:
        if translation.text != translation.message or translation.language.startswith("en"):
            yield translation
