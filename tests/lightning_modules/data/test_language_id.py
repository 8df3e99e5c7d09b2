"""LanguageIdDataModule: characters as tokens, a split without leaks, every text once an epoch, an exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import FitFunction, KeepEveryCheckpoint
from torch import Tensor

from lightning_modules.data import language_id
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.translations import Translation
from lightning_modules.errors import DataError


@pytest.fixture
def all_texts() -> list[Translation]:
    return language_id.load_translations(20)  # read once in a process


def tokens_of(loader: Any) -> Tensor:
    return torch.cat([tokens for tokens, _ in loader])


def test_splits_share_no_message_and_no_text(all_texts: list[Translation]) -> None:
    data = LanguageIdDataModule()
    splits = [data.train_texts, data.validation_texts, data.test_texts]
    assert sorted(text for split in splits for text in split) == all_texts
    for field in ("message", "text"):
        values = [{getattr(text, field) for text in split} for split in splits]
        assert values[0].isdisjoint(values[1])
        assert values[0].isdisjoint(values[2])
        assert values[1].isdisjoint(values[2])
    for split in splits[1:]:
        assert len(split) == pytest.approx(0.1 * len(all_texts), rel=0.2)


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (LanguageIdDataModule(seed=seed).test_texts for seed in (0, 0, 1))
    assert first == again != other


def test_batches_are_the_texts_with_their_languages() -> None:
    data = LanguageIdDataModule(batch_size=100, context_length=30)
    token_BT, label_B = next(iter(data.val_dataloader()))
    assert token_BT.shape == (100, 30)
    assert token_BT.dtype == label_B.dtype == torch.int64
    for tokens, label, text in zip(token_BT.tolist(), label_B.tolist(), data.validation_texts, strict=False):
        assert data.class_names[label] == text.language
        head = text.text[:30]
        want = [character if character in data.vocabulary else data.vocabulary[1] for character in head]
        assert [data.vocabulary[token] for token in tokens] == want + [data.vocabulary[0]] * (30 - len(head))


def test_vocabulary_is_that_of_training() -> None:
    data = LanguageIdDataModule()
    assert len(set(data.vocabulary)) == len(data.vocabulary)
    count = dict.fromkeys(data.vocabulary[2:], 0)
    for text in data.train_texts:
        for character in text.text:
            if character in count:
                count[character] += 1
    assert min(count.values()) == 2
    assert 1 in tokens_of(data.train_dataloader())  # so that what <unknown> means is learnt
    assert not set(data.vocabulary[:2]) & {character for text in data.train_texts for character in text.text}


def test_an_epoch_shows_no_text_twice_and_epochs_differ_in_order() -> None:
    data = LanguageIdDataModule(batch_size=64, context_length=400)  # no text is cut short
    loader = data.train_dataloader()
    first, second = tokens_of(loader), tokens_of(loader)
    assert len(first) == len(data.train_texts) // 64 * 64
    # A rare character stands for another: a few texts may look alike as tokens.
    assert len({tuple(row) for row in first.tolist()}) >= len(first) - 5
    assert not torch.equal(first, second)


def test_processes_part_the_epoch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    whole = tokens_of(LanguageIdDataModule(batch_size=48).train_dataloader())
    for rank in range(3):
        monkeypatch.setattr("lightning_modules.data.loader.rank_and_world_size", lambda rank=rank: (rank, 3))
        parts.append(tokens_of(LanguageIdDataModule(batch_size=16).train_dataloader()))
    assert len({len(part) for part in parts}) == 1
    together = sorted(row for part in parts for row in part.tolist())
    assert together == sorted(whole.tolist())


def test_resume_from_any_checkpoint_equals_the_uninterrupted_run(
    fit: FitFunction, keep_every_checkpoint: KeepEveryCheckpoint, tmp_path: Path
) -> None:
    def data() -> LanguageIdDataModule:
        return LanguageIdDataModule(batch_size=5000, context_length=4)

    uninterrupted = fit(data(), callbacks=[keep_every_checkpoint], max_epochs=2)
    assert len(uninterrupted) == 6
    for path in sorted(tmp_path.glob("*.ckpt")):
        num_done = int(path.stem.split("-")[1])
        resumed = fit(data(), ckpt_path=path, max_epochs=2)
        assert len(resumed) == 6 - num_done, path.name
        assert all(map(torch.equal, resumed, uninterrupted[num_done:])), path.name


def test_a_checkpoint_knows_its_django() -> None:
    data = LanguageIdDataModule(batch_size=8)
    again = LanguageIdDataModule(**data.hparams)
    assert again.hparams == data.hparams
    with pytest.raises(DataError, match=r"^the installed Django \(.+\) must be 1\.0: pip install Django==1\.0$"):
        LanguageIdDataModule(**(dict(data.hparams) | {"django_version": "1.0"}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"^batch_size \(0\) must be >= 1$"),
        ({"batch_size": 10**6}, r"^batch_size \(1000000\) must be <= training texts \(\d+\)$"),
        ({"context_length": 0}, r"^context_length \(0\) must be >= 1$"),
        ({"min_length": 0}, r"^min_length \(0\) must be >= 1$"),
        ({"seed": -2}, r"^seed \(-2\) must be >= 0$"),
        ({"test_fraction": 1.5}, r"^test_fraction \(1.5\) must be in \(0, 1\)$"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"^validation_fraction \+ test_fraction \(1.0\) must be in"),
        ({"validation_fraction": 0.89}, r"^number of training texts in \w+ \(0\) must be >= 1$"),
        ({"test_fraction": 1e-9}, r"^number of test texts \(0\) must be >= 1$"),
    ],
)
def test_wrong_values_are_told_with_the_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LanguageIdDataModule(**arguments)
