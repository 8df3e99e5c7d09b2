"""TextDataModule: vocabulary, splits, windows, the same batches again, and an exact resume."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_runs import TEXT, FitFunction, KeepEveryCheckpoint
from torch import Tensor

from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import DataError


def decode(data: TextDataModule, token_N: Tensor) -> str:
    return "".join(data.vocabulary[token] for token in token_N.tolist())


def small(text_file: Path, **arguments: Any) -> TextDataModule:
    return TextDataModule(**({"path": text_file, "context_length": 16, "batch_size": 4, "batches_per_epoch": 5} | arguments))


def test_vocabulary_is_the_sorted_characters_of_both_splits(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcabcabcabcabcaéz🙂yx", encoding="utf-8")
    data = TextDataModule(path=path, context_length=2, validation_fraction=0.25)
    assert data.vocabulary == "abcxyzé🙂"
    assert data.vocab_size == 8
    batches = list(data.val_dataloader())
    assert "".join(decode(data, input_BT.flatten()) for input_BT, _ in batches) == "éz🙂y"
    assert decode(data, batches[-1][1][-1]) == "yx"


def test_validation_is_the_tail_in_windows_that_do_not_overlap(text_file: Path) -> None:
    data = small(text_file, validation_fraction=0.25)
    tail = TEXT[len(TEXT) - len(TEXT) // 4 :]
    batches = list(data.val_dataloader())
    input_WT = torch.cat([inputs for inputs, _ in batches])
    target_WT = torch.cat([targets for _, targets in batches])
    num_windows = (len(tail) - 1) // 16
    assert input_WT.shape == target_WT.shape == (num_windows, 16)
    assert input_WT.dtype == target_WT.dtype == torch.int64
    assert decode(data, input_WT.flatten()) == tail[: num_windows * 16]
    assert decode(data, target_WT.flatten()) == tail[1 : num_windows * 16 + 1]
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert all(torch.equal(got[0], want[0]) for got, want in zip(loader, batches, strict=True))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context_length=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_training_windows_lie_in_the_training_text(text_file: Path, context_length: int, batch_size: int, seed: int) -> None:
    data = small(text_file, context_length=context_length, batch_size=batch_size, seed=seed)
    train_text = TEXT[: len(TEXT) - len(TEXT) // 10]
    for input_BT, target_BT in data.train_dataloader():
        assert input_BT.shape == target_BT.shape == (batch_size, context_length)
        assert input_BT.dtype == target_BT.dtype == torch.int64
        assert input_BT.is_contiguous()
        assert target_BT.is_contiguous()
        for input_T, target_T in zip(input_BT, target_BT, strict=True):
            assert decode(data, input_T) + decode(data, target_T[-1:]) in train_text
            assert torch.equal(input_T[1:], target_T[:-1])


def test_training_documents_are_all_of_the_training_text_once(text_file: Path) -> None:
    data = TextDataModule(path=text_file, context_length=7, seed=3)
    text, found = data._train_N.tolist(), data.training_documents().tolist()
    windows = [text[start : start + 7] for start in range(0, len(text) - 6, 7)]
    assert found != windows  # a part of them is drawn from the whole text
    assert sorted(found) == sorted(windows)
    assert torch.equal(data.training_documents(), TextDataModule(path=text_file, context_length=7, seed=3).training_documents())


def test_shortest_training_text_gives_its_only_window(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdeabcde")
    data = TextDataModule(path=path, context_length=4, batch_size=3, validation_fraction=0.5)
    input_BT, target_BT = next(iter(data.train_dataloader()))
    assert [decode(data, row) for row in input_BT] == ["abcd"] * 3
    assert [decode(data, row) for row in target_BT] == ["bcde"] * 3


def test_starts_are_the_documented_draw(text_file: Path) -> None:
    data = small(text_file, seed=7)
    loader = data.train_dataloader()
    list(loader)
    input_BT, _ = list(loader)[3]
    num_train = len(TEXT) - len(TEXT) // 10
    starts = np.random.default_rng((7, 1, 3)).integers(num_train - 16, size=(1, 4))[0]
    assert [decode(data, row) for row in input_BT] == [TEXT[start : start + 16] for start in starts]


def test_same_seed_same_batches_and_another_seed_others(text_file: Path) -> None:
    first, again, other = (
        torch.stack([inputs for inputs, _ in small(text_file, seed=seed).train_dataloader()]) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_epochs_and_batches_differ(text_file: Path) -> None:
    loader = small(text_file).train_dataloader()
    batches = [inputs for _ in range(2) for inputs, _ in loader]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches) == 10


def test_processes_share_one_draw_without_overlap(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_of(rank: int, world_size: int) -> list[list[int]]:
        monkeypatch.setattr("lightning_modules.data.text.rank_and_world_size", lambda: (rank, world_size))
        rows: list[list[int]] = next(iter(small(text_file).train_dataloader()))[0].tolist()
        return rows

    assert batch_of(0, 2) + batch_of(1, 2) != 2 * batch_of(0, 2)
    num_train = len(TEXT) - len(TEXT) // 10
    starts = np.random.default_rng((0, 0, 0)).integers(num_train - 16, size=(2, 4))
    data = small(text_file)
    for rank in range(2):
        texts = [decode(data, torch.tensor(row)) for row in batch_of(rank, 2)]
        assert texts == [TEXT[start : start + 16] for start in starts[rank]]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"max_epochs": -1, "max_steps": 15}, {"val_check_interval": 2}],
    ids=["max_epochs", "max_steps", "validation inside the epoch"],
)
def test_resume_from_any_checkpoint_equals_the_uninterrupted_run(
    arguments: dict[str, Any],
    text_file: Path,
    fit: FitFunction,
    keep_every_checkpoint: KeepEveryCheckpoint,
    tmp_path: Path,
) -> None:
    uninterrupted = fit(small(text_file), callbacks=[keep_every_checkpoint], **arguments)
    assert len(uninterrupted) == 15
    assert len({tuple(batch.flatten().tolist()) for batch in uninterrupted}) == 15
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 15 + 3 + 3
    for path in checkpoints:
        num_done = int(path.stem.split("-")[1])
        resumed = fit(small(text_file), ckpt_path=path, **arguments)
        assert len(resumed) == 15 - num_done, path.name
        assert all(map(torch.equal, resumed, uninterrupted[num_done:])), path.name


def test_resume_with_fewer_batches_than_the_epoch_has(
    text_file: Path, fit: FitFunction, keep_every_checkpoint: KeepEveryCheckpoint, tmp_path: Path
) -> None:
    uninterrupted = fit(small(text_file), callbacks=[keep_every_checkpoint], limit_train_batches=3)
    for name in ("batch-4", "epoch-3", "validation-6"):
        resumed = fit(small(text_file), ckpt_path=tmp_path / f"{name}.ckpt", limit_train_batches=3)
        num_done = int(name.split("-")[1])
        assert len(resumed) == 9 - num_done
        assert all(map(torch.equal, resumed, uninterrupted[num_done:]))


def test_overfit_batches_repeats_them(text_file: Path, fit: FitFunction) -> None:
    seen = fit(small(text_file), overfit_batches=2)
    assert len(seen) == 6
    assert all(map(torch.equal, seen[2:], seen[:4]))


def test_hyperparameters_are_plain_and_load_with_weights_only(
    text_file: Path, fit: FitFunction, keep_every_checkpoint: KeepEveryCheckpoint, tmp_path: Path
) -> None:
    data = small(text_file)
    assert data.hparams["path"] == str(text_file)
    fit(data, callbacks=[keep_every_checkpoint], max_epochs=1)
    checkpoint = torch.load(tmp_path / "batch-1.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"] == dict(data.hparams)
    again = TextDataModule.load_from_checkpoint(tmp_path / "batch-1.ckpt", weights_only=True)
    assert again.vocabulary == data.vocabulary
    assert again.batch_size == 4


def test_default_needs_no_file_and_no_download() -> None:
    data = TextDataModule()
    input_BT, target_BT = next(iter(data.train_dataloader()))
    assert input_BT.shape == target_BT.shape == (16, 128)
    assert len(data.train_dataloader()) == 100
    assert "\n" in data.vocabulary


def test_sha256_must_match_when_given(text_file: Path) -> None:
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert small(text_file, sha256=digest.upper()).text_sha256 == digest
    with pytest.raises(DataError, match=rf"^sha256 of .*text.txt \({digest}\) must be abc$"):
        small(text_file, sha256="abc")


def test_what_is_held_out_is_a_copy_of_the_head_of_validation(text_file: Path) -> None:
    data = small(text_file)
    tail = TEXT[len(TEXT) - len(TEXT) // 10 :]
    for num_tokens, num_windows in ((1, 1), (40, 2), (10**6, (len(tail) - 1) // 16)):
        token_BT, target_BT = data.held_out(num_tokens)
        assert token_BT.dtype == torch.int64
        assert decode(data, token_BT.flatten()) == tail[: num_windows * 16]
        assert target_BT is not None
        assert decode(data, target_BT.flatten()) == tail[1 : num_windows * 16 + 1]
        token_BT.zero_()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_length": 0}, r"^context_length \(0\) must be >= 1$"),
        ({"batch_size": 0}, r"^batch_size \(0\) must be >= 1$"),
        ({"batches_per_epoch": -1}, r"^batches_per_epoch \(-1\) must be >= 1$"),
        ({"seed": -1}, r"^seed \(-1\) must be >= 0$"),
        ({"validation_fraction": 0.0}, r"^validation_fraction \(0.0\) must be in \(0, 1\)$"),
        ({"validation_fraction": 1.0}, r"^validation_fraction \(1.0\) must be in \(0, 1\)$"),
        ({"corpus": "enwik8"}, r"^corpus \('enwik8'\) must be one of pydoc, tinyshakespeare, wikitext-2$"),
        ({"path": "absent.txt"}, r"^text file absent.txt cannot be read: No such file or directory$"),
        (
            {"context_length": 300},
            r"^validation split of .*text.txt \(\d+ characters\) must be >= context_length \+ 1 \(301\)$",
        ),
        (
            {"context_length": 300, "validation_fraction": 0.95},
            r"^training split of .*text.txt \(\d+ characters\) must be >= context_length \+ 1 \(301\)$",
        ),
    ],
)
def test_wrong_values_are_told_with_the_rule(arguments: dict[str, Any], message: str, text_file: Path) -> None:
    with pytest.raises(DataError, match=message):
        small(text_file, **arguments)


@pytest.mark.skipif("TRIX_DATA_DIR" not in os.environ, reason="TRIX_DATA_DIR names no folder with the data sets")
@pytest.mark.parametrize(
    ("corpus", "vocab_size", "num_train", "num_validation"),
    [("tinyshakespeare", 65, 1_003_855, 111_539), ("wikitext-2", 137, 1_255_018, 1_120_192)],
)
def test_named_corpora_have_their_known_sizes(corpus: Any, vocab_size: int, num_train: int, num_validation: int) -> None:
    data = TextDataModule(corpus)
    assert data.vocab_size == vocab_size
    windows = TextDataModule(corpus, context_length=1).val_dataloader()
    assert len(windows.dataset) == num_validation - 1  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"training split of .* \({num_train} characters\)|validation split"):
        TextDataModule(corpus, context_length=2_000_000)
