"""Translated texts: cleaned of what is the same in all languages, each in one language, and from files alone."""

import importlib.metadata
import sys
import unicodedata

import pytest
from forked_scripts import run_script

from lightning_modules.data import translations
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.translations import Translation, digest_of, load_translations, part_of, plain_text
from lightning_modules.errors import DataError


@pytest.fixture(scope="module")
def texts() -> list[Translation]:
    return load_translations(min_length=20)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Bitte %(name)s eingeben, %s oder {field}.", "Bitte eingeben, oder ."),
        ("100 % sicher, {} bis %d", "100 % sicher, bis"),
        ("%(value).1f Milliarden, %.2f", "Milliarden,"),
        ('Siehe <a href="%(url)s">hier</a>\nweiter', "Siehe hier weiter"),
        ("e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}", "été"),
    ],
)
def test_placeholders_and_markup_go(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_there_are_98_languages_and_over_20000_texts(texts: list[Translation]) -> None:
    assert len({text.language for text in texts}) == 98
    assert 20_000 < len(texts) < 26_000
    assert {"de", "pt_BR", "sr_Latn", "zh_Hans"} <= {text.language for text in texts}


def test_texts_are_long_enough_and_clean(texts: list[Translation]) -> None:
    assert min(len(text.text) for text in texts) == 20
    assert not any("%(" in text.text or "</" in text.text or "\n" in text.text for text in texts)
    assert all(unicodedata.is_normalized("NFC", text.text) for text in texts)


def test_no_text_stands_twice_or_in_two_languages(texts: list[Translation]) -> None:
    assert len({text.text for text in texts}) == len(texts)


def test_text_left_in_english_counts_for_english_alone(texts: list[Translation]) -> None:
    untranslated = {text.language for text in texts if text.text == text.message}
    assert untranslated == {"en_AU", "en_GB"}


def catalogue(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str, str]) -> None:
    monkeypatch.setattr(translations, "_read_catalogues", lambda: iter([Translation(*entry) for entry in entries]))


def test_which_texts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(
        monkeypatch,
        ("xx", "second", "said for two messages %s"),
        ("xx", "first", "said for two messages"),
        ("xx", "third", "the same in two"),
        ("yy", "third", "the same in two"),
        ("yy", "left in English", "left in English"),
        ("en_XX", "left in English", "left in English"),
        ("xx", "short", "short"),
    )
    assert load_translations(min_length=6) == [
        Translation("en_XX", "left in English", "left in English"),
        Translation("xx", "first", "said for two messages"),
    ]


def test_a_django_without_translations_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue(monkeypatch)
    with pytest.raises(DataError, match=r"^number of translations in Django .* \(0\) must be >= 1$"):
        load_translations(min_length=20)


def test_django_is_never_imported() -> None:
    code = "import sys; from lightning_modules.data.translations import load_translations as load; load(20)\n"
    result = run_script(code + "assert 'django' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_parts_are_fixed_uniform_and_differ_with_the_seed() -> None:
    parts = [part_of(f"message {index}", 0) for index in range(2000)]
    assert part_of("Save", 0) == part_of("Save", 0) != part_of("Save", 1)
    assert 0 <= min(parts) < max(parts) < 1
    assert sum(part < 0.1 for part in parts) == pytest.approx(200, abs=60)


def test_digest_tells_every_change(texts: list[Translation]) -> None:
    few = texts[:3]
    changed = [*few[:2], few[2]._replace(message=few[2].message + "!")]
    assert len({digest_of(few), digest_of(few[::-1]), digest_of(changed), digest_of(few[:2])}) == 4


@pytest.mark.parametrize("make", [LanguageIdDataModule, lambda: load_translations(20)])
def test_missing_django_is_told_with_the_way_out(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DataError, match=r"Django must be installed.*: pip install 'trix\[data\]'$"):
        make()  # type: ignore[operator]


def test_missing_babel_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babel.messages.mofile", None)
    with pytest.raises(DataError, match=r"babel must be installed.*: pip install 'trix\[data\]'$"):
        load_translations(20)
