"""Characters as tokens, next character as target: any text, in windows of `context_length`.

Shape suffixes: B batch, T tokens of a window, N tokens of a split, W windows of a split,
V characters of the vocabulary.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.data.corpora import CORPUS_NAMES, Corpus, CorpusName, load_corpus, load_file
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.loader import ResumableLoader, evaluation_loader, rank_and_world_size
from lightning_modules.errors import DataError

TokenBatch = tuple[Tensor, Tensor]


class TextDataModule(TrixDataModule):
    """Character-level language modelling on one text.

    Training: batch i of epoch e holds `batch_size` windows whose starts are drawn uniformly (with replacement) by
    `numpy.random.default_rng((seed, e, i))`, so it is a function of (seed, e, i) alone and a run resumes exactly.
    Under ddp each of the processes takes its own row of one common draw. Validation, test and prediction: all of
    the validation text in windows that do not overlap; a last window shorter than `context_length` is dropped.

    Shape:
        batches: (input_BT, target_BT), int64 in [0, vocab_size); target_BT is the text one character further on.

    Args:
        corpus: `pydoc` (needs no download), `tinyshakespeare` or `wikitext-2` (trained on its test.txt and validated
            on its valid.txt; the training split of 10.8 MB is not used). See `corpora.load_corpus`.
        path: a UTF-8 text file to use in place of the corpus.
        context_length: T, characters in a window.
        batch_size: B, windows in a batch (of each process).
        validation_fraction: the part at the end of the text that is held out, in (0, 1); wikitext-2 has its own
            validation file and ignores it.
        seed: seed of the training windows, >= 0.
        batches_per_epoch: training batches in an epoch.
        sha256: hex digest that the text must have: of the file's bytes (wikitext-2: test.txt, then valid.txt; pydoc:
            the joined topics in UTF-8). None accepts any text.

    Attributes:
        vocabulary: the sorted distinct characters of the training and validation text; a token id is a place in it.
        vocab_size: how many they are.
        text_sha256: the digest that `sha256` is compared with.

    Raises:
        DataError: a value is out of range, the text cannot be had, or a split has less than `context_length + 1`
            characters.
    """

    noun: ClassVar[str] = "text"

    def __init__(
        self,
        corpus: CorpusName = "pydoc",
        path: Path | str | None = None,
        context_length: int = 128,
        batch_size: int = 16,
        validation_fraction: float = 0.1,
        seed: int = 0,
        batches_per_epoch: int = 100,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if corpus not in CORPUS_NAMES:
            raise DataError(f"corpus ({corpus!r:.40}) must be one of {', '.join(CORPUS_NAMES)}")
        check_at_least(1, context_length=context_length, batch_size=batch_size, batches_per_epoch=batches_per_epoch)
        check_at_least(0, seed=seed)
        check_fraction(validation_fraction=validation_fraction)
        for name, value in (("path", path), ("sha256", sha256)):
            if value is not None and not isinstance(value, str | Path):
                raise DataError(f"{name} ({value!r:.40}) must be a str")
        # Plain values only, so that checkpoints load with weights_only=True; `path` may be a Path.
        self.save_hyperparameters(
            {
                "corpus": corpus,
                "path": None if path is None else str(path),
                "context_length": context_length,
                "batch_size": batch_size,
                "validation_fraction": validation_fraction,
                "seed": seed,
                "batches_per_epoch": batches_per_epoch,
                "sha256": sha256,
            }
        )
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch

        text = load_corpus(corpus) if path is None else load_file(path)
        if sha256 is not None and str(sha256).lower() != text.sha256:
            raise DataError(f"sha256 of {text.source} ({text.sha256}) must be {sha256}")
        self.text_sha256 = text.sha256
        train_text, validation_text = _split(text, validation_fraction, context_length)
        self.vocabulary = "".join(sorted(set(train_text) | set(validation_text)))
        self.vocab_size = len(self.vocabulary)
        self._train_N = _encode(train_text, self.vocabulary)
        self._validation_N = _encode(validation_text, self.vocabulary)

    def train_dataloader(self) -> ResumableLoader[TokenBatch]:
        """`batches_per_epoch` batches of random windows, resumable within an epoch."""
        rank, world_size = rank_and_world_size()

        def make_batch(epoch: int, batch_idx: int) -> TokenBatch:
            return self._training_batch(epoch, batch_idx, rank, world_size)

        return ResumableLoader(
            make_batch,
            self.batches_per_epoch,
            settings={
                "text_sha256": self.text_sha256,
                "seed": self.seed,
                "context_length": self.context_length,
                "batch_size": self.batch_size,
                "batches_per_epoch": self.batches_per_epoch,
                "world_size": world_size,
            },
            trainer=self.trainer,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All validation text once, in windows that do not overlap; the last partial window is dropped."""
        num_windows = (len(self._validation_N) - 1) // self.context_length
        num_tokens = num_windows * self.context_length
        input_WT = self._validation_N[:num_tokens].view(num_windows, self.context_length)
        target_WT = self._validation_N[1 : num_tokens + 1].view(num_windows, self.context_length)
        return evaluation_loader(input_WT, target_WT, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same windows as validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same windows as validation."""
        return self.val_dataloader()

    @override
    def training_documents(self) -> Tensor:
        """All training text once, in windows that do not overlap, in an order drawn with the seed; the last partial window is
        dropped."""
        num_windows = len(self._train_N) // self.context_length
        input_WT = self._train_N[: num_windows * self.context_length].view(num_windows, self.context_length)
        return input_WT[torch.from_numpy(np.random.default_rng(self.seed).permutation(num_windows))]

    @override
    def facts(self) -> dict[str, str]:
        return {"data": f"validation text of {self.hparams['path'] or self.hparams['corpus']}, character by character"}

    def _training_batch(self, epoch: int, batch_idx: int, rank: int, world_size: int) -> TokenBatch:
        generator = np.random.default_rng((self.seed, epoch, batch_idx))
        num_starts = len(self._train_N) - self.context_length
        start_B = torch.from_numpy(generator.integers(num_starts, size=(world_size, self.batch_size))[rank])
        place_BT = start_B[:, None] + torch.arange(self.context_length)
        return self._train_N[place_BT], self._train_N[place_BT + 1]


def _split(text: Corpus, validation_fraction: float, context_length: int) -> tuple[str, str]:
    """The training text and the validation text: the corpus' own, or the contiguous tail of its text."""
    train_text, validation_text = text.train_text, text.validation_text
    if validation_text is None:
        num_train = len(train_text) - int(len(train_text) * validation_fraction)
        train_text, validation_text = train_text[:num_train], train_text[num_train:]
    for split, split_text in (("training", train_text), ("validation", validation_text)):
        if len(split_text) <= context_length:
            raise DataError(
                f"{split} split of {text.source} ({len(split_text)} characters) must be "
                f">= context_length + 1 ({context_length + 1})"
            )
    return train_text, validation_text


def _encode(text: str, vocabulary: str) -> Tensor:
    """Token ids, int64 [N]: the place of each character in the sorted vocabulary, which holds them all."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    known_V = np.frombuffer(vocabulary.encode("utf-32-le"), dtype="<u4")
    return torch.from_numpy(np.searchsorted(known_V, code_N).astype(np.int64))
