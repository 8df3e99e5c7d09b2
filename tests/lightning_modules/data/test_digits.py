"""DigitsDataModule: images as rows of pixels, a stratified split, every image once an epoch, an exact resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_runs import FitFunction, KeepEveryCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.errors import DataError


def images_of(loader: Any) -> Tensor:
    return torch.cat([images for images, _ in loader])


def test_images_are_rows_scaled_to_one() -> None:
    data = DigitsDataModule(batch_size=10)
    digits = load_digits()
    known = {image.astype(np.float32).tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    for image_BTD, label_B in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert image_BTD.shape == (10, 8, 8)
        assert image_BTD.dtype == torch.float32
        assert label_B.dtype == torch.int64
        assert [known[(image * 16).numpy().tobytes()] for image in image_BTD] == label_B.tolist()
    assert images_of(data.train_dataloader()).min() == 0
    assert images_of(data.train_dataloader()).max() == 1
    assert data.class_names == tuple("0123456789")
    assert data.num_classes == 10


def test_split_is_stratified_disjoint_and_whole() -> None:
    data = DigitsDataModule(batch_size=1)
    label_N = torch.cat([labels for _, labels in data.train_dataloader()])
    held_out_N = torch.cat([labels for _, labels in data.val_dataloader()])
    assert (len(label_N), len(held_out_N)) == (1438, 359)
    share_C = torch.bincount(label_N) / len(label_N)
    held_out_share_C = torch.bincount(held_out_N) / len(held_out_N)
    assert (share_C - held_out_share_C).abs().max() < 0.003
    both = torch.cat([images_of(data.train_dataloader()), images_of(data.val_dataloader())])
    everything = torch.from_numpy(load_digits().images.astype(np.float32) / 16)
    assert torch.equal(torch.sort(both.sum((1, 2))).values, torch.sort(everything.sum((1, 2))).values)


def test_test_and_prediction_are_the_validation_images() -> None:
    data = DigitsDataModule()
    want = images_of(data.val_dataloader())
    assert torch.equal(images_of(data.test_dataloader()), want)
    assert torch.equal(images_of(data.predict_dataloader()), want)


def test_an_epoch_shows_no_image_twice_and_epochs_differ_in_order() -> None:
    loader = DigitsDataModule(batch_size=64).train_dataloader()
    assert len(loader) == 1438 // 64
    first, second = images_of(loader), images_of(loader)
    assert len(first) == 22 * 64
    assert len({image.numpy().tobytes() for image in first}) == len(first)
    assert not torch.equal(first, second)


def test_same_seed_same_batches_and_another_seed_others() -> None:
    first, again, other = (images_of(DigitsDataModule(seed=seed).train_dataloader()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_processes_part_the_epoch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(3):
        monkeypatch.setattr("lightning_modules.data.loader.rank_and_world_size", lambda rank=rank: (rank, 3))
        parts.append(images_of(DigitsDataModule(batch_size=16).train_dataloader()))
    assert {len(part) for part in parts} == {1438 // 48 * 16}
    assert len({image.numpy().tobytes() for image in torch.cat(parts)}) == 1438 // 48 * 48


def test_resume_from_any_checkpoint_equals_the_uninterrupted_run(
    fit: FitFunction, keep_every_checkpoint: KeepEveryCheckpoint, tmp_path: Path
) -> None:
    def data() -> DigitsDataModule:
        return DigitsDataModule(batch_size=400)

    uninterrupted = fit(data(), callbacks=[keep_every_checkpoint])
    assert len(uninterrupted) == 9
    for path in sorted(tmp_path.glob("*.ckpt")):
        num_done = int(path.stem.split("-")[1])
        resumed = fit(data(), ckpt_path=path)
        assert len(resumed) == 9 - num_done, path.name
        assert all(map(torch.equal, resumed, uninterrupted[num_done:])), path.name


def test_hyperparameters_are_plain() -> None:
    assert dict(DigitsDataModule(batch_size=8).hparams) == {"batch_size": 8, "validation_fraction": 0.2, "seed": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"^batch_size \(0\) must be >= 1$"),
        ({"batch_size": 1439}, r"^batch_size \(1439\) must be <= training images \(1438\)$"),
        ({"seed": -2}, r"^seed \(-2\) must be >= 0$"),
        ({"validation_fraction": 1.5}, r"^validation_fraction \(1.5\) must be in \(0, 1\)$"),
        ({"validation_fraction": 0.001}, r"^number of validation images \(2\) must be >= classes \(10\)$"),
        ({"validation_fraction": 0.999}, r"^number of training images \(2\) must be >= classes \(10\)$"),
    ],
)
def test_wrong_values_are_told_with_the_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DigitsDataModule(**arguments)
