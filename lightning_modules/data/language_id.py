"""Which language is it? The characters of a short text are the tokens, its language is the label.

Shape suffixes: B batch, N texts of a split, T characters of a text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.loader import ResumableLoader, evaluation_loader, permuted_loader
from lightning_modules.data.translations import (
    DISTRIBUTION,
    Translation,
    digest_of,
    installed_version,
    load_translations,
    part_of,
)
from lightning_modules.errors import DataError
from trix.nn import PADDING_TOKEN

TextBatch = tuple[Tensor, Tensor]

# Places 0 and 1 of the vocabulary: characters that no text holds.
PADDING_CHARACTER, UNKNOWN_CHARACTER = "\0", "\N{REPLACEMENT CHARACTER}"
UNKNOWN_TOKEN = 1
# A character seen once in training is as good as unknown, and <unknown> is then something that training has met.
MIN_CHARACTER_COUNT = 2


class LanguageIdDataModule(TrixDataModule):
    """The translations inside the Django wheel (98 languages; extra ``[data]``): no download, and Django is never imported.

    What is taken as a text: see :func:`~lightning_modules.data.translations.load_translations`; no text stands in two
    languages or twice in one. The split goes by the English message that a text translates: a hash of it and the seed says
    whether all of its translations are for training, validation or test, so nothing is learnt from a sister language's
    version of a held-out text.

    Training: epoch e is the permutation of `numpy.random.default_rng((seed, e))`, cut into batches; the texts that do not fill
    the last batch are dropped, others in each epoch. Under ddp each process takes its own part of every cut. Validation, test:
    all texts of the split in order; prediction: those of the validation.

    Shape:
        batches: (token_BT, label_B): int64 in [0, len(vocabulary)), and int64 in [0, num_classes). A text shorter than
        context_length is filled up with token 0, of a longer one the head is taken.

    Args:
        batch_size: B, texts in a batch (of each process).
        context_length: T.
        min_length: the least number of characters of a text, placeholders and markup not counted.
        validation_fraction, test_fraction: the parts of the messages that are held out, each in (0, 1), together below 1.
        seed: seed of the split and of the order of the training texts, >= 0.
        django_version: the version that must be installed; None accepts any. A checkpoint keeps the one that was.

    Attributes:
        class_names: the languages by label, as Django writes their codes. num_classes: how many they are.
        vocabulary: two stand-ins (padding, unknown) and the sorted characters that training has at least twice; a token id is a
            place in it. texts_sha256: digest of all texts, languages and messages.

    Raises:
        DataError: a value is out of range, the translations cannot be had, or a language has no training text.
    """

    noun: ClassVar[str] = "text"

    def __init__(
        self,
        batch_size: int = 64,
        context_length: int = 64,
        min_length: int = 20,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        django_version: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, context_length=context_length, min_length=min_length)
        check_at_least(0, seed=seed)
        check_fraction(validation_fraction=validation_fraction, test_fraction=test_fraction)
        check_fraction(**{"validation_fraction + test_fraction": validation_fraction + test_fraction})
        version = installed_version()
        if django_version is not None and version != django_version:
            raise DataError(
                f"the installed {DISTRIBUTION} ({version}) must be {django_version}: "
                f"pip install {DISTRIBUTION}=={django_version}"
            )
        self.save_hyperparameters(
            {
                "batch_size": batch_size,
                "context_length": context_length,
                "min_length": min_length,
                "validation_fraction": validation_fraction,
                "test_fraction": test_fraction,
                "seed": seed,
                "django_version": version,
            }
        )
        self.batch_size, self.context_length, self.seed = batch_size, context_length, seed
        translations = load_translations(min_length)
        self.texts_sha256 = digest_of(translations)
        self.class_names = tuple(sorted({translation.language for translation in translations}))
        self.num_classes = len(self.class_names)
        self.train_texts, self.validation_texts, self.test_texts = _split(
            translations, validation_fraction, test_fraction, seed
        )
        self._check_splits()
        self.vocabulary = _vocabulary(self.train_texts)
        self._train = self._tensors(self.train_texts)

    def _check_splits(self) -> None:
        missing = set(self.class_names) - {translation.language for translation in self.train_texts}
        if missing:
            raise DataError(f"number of training texts in {min(missing)} (0) must be >= 1")
        for split, texts in (("validation", self.validation_texts), ("test", self.test_texts)):
            if not texts:
                raise DataError(f"number of {split} texts (0) must be >= 1")
        if self.batch_size > len(self.train_texts):
            raise DataError(f"batch_size ({self.batch_size}) must be <= training texts ({len(self.train_texts)})")

    def train_dataloader(self) -> ResumableLoader[TextBatch]:
        """Whole batches of each epoch's permutation, resumable within an epoch."""
        settings: dict[str, int | str] = {"texts_sha256": self.texts_sha256, "context_length": self.context_length}
        return permuted_loader(*self._train, "texts", self.batch_size, self.seed, settings, self.trainer)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All validation texts once, in order; the last batch may be smaller."""
        return evaluation_loader(*self._tensors(self.validation_texts), self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All test texts once, in order; the last batch may be smaller."""
        return evaluation_loader(*self._tensors(self.test_texts), self.batch_size)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same texts as validation."""
        return self.val_dataloader()

    @override
    def facts(self) -> dict[str, str]:
        return {"data": "validation texts in many languages, character by character; padding is not counted"}

    def _tensors(self, translations: Sequence[Translation]) -> tuple[Tensor, Tensor]:
        label = {language: index for index, language in enumerate(self.class_names)}
        token_NT = encode([translation.text for translation in translations], self.vocabulary, self.context_length)
        return token_NT, torch.tensor([label[translation.language] for translation in translations])


def encode(texts: Sequence[str], vocabulary: str, length: int) -> Tensor:
    """Token ids, int64 [N, length], of the heads of plain texts (:func:`~lightning_modules.data.translations.plain_text`).

    A character that the vocabulary lacks is token 1; the rest of a row is token 0.
    """
    place = {character: index for index, character in enumerate(vocabulary)}
    token_NT = np.full((len(texts), length), PADDING_TOKEN, dtype=np.int64)
    for row_T, text in zip(token_NT, texts, strict=True):
        tokens = [place.get(character, UNKNOWN_TOKEN) for character in text[:length]]
        row_T[: len(tokens)] = tokens
    return torch.from_numpy(token_NT)


def _split(
    translations: Sequence[Translation], validation_fraction: float, test_fraction: float, seed: int
) -> tuple[list[Translation], list[Translation], list[Translation]]:
    """Training, validation and test: messages are dealt out, each with all of its translations."""
    splits: tuple[list[Translation], list[Translation], list[Translation]] = ([], [], [])
    for translation in translations:
        part = part_of(translation.message, seed)
        place = 2 if part < test_fraction else 1 if part < test_fraction + validation_fraction else 0
        splits[place].append(translation)
    return splits


def _vocabulary(translations: Sequence[Translation]) -> str:
    count = Counter(character for translation in translations for character in translation.text)
    known = sorted(character for character in count if count[character] >= MIN_CHARACTER_COUNT)
    return PADDING_CHARACTER + UNKNOWN_CHARACTER + "".join(known)
