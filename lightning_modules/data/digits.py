"""Handwritten digits as short sequences: each of the eight rows of an image is a token of eight pixels.

Shape suffixes: B batch, N images, T rows (8), D pixels of a row (8).
"""

import hashlib
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.loader import ResumableLoader, evaluation_loader, permuted_loader
from lightning_modules.errors import DataError

ImageBatch = tuple[Tensor, Tensor]

MAX_PIXEL = 16.0
SHADES = " .:*#"


class DigitsDataModule(TrixDataModule):
    """The 1797 handwritten digits (8x8 pixels) that come with scikit-learn: no download.

    The split is stratified: both parts have the classes in equal proportion. Training: epoch e is the permutation
    of `numpy.random.default_rng((seed, e))`, cut into batches; the images that do not fill the last batch are
    dropped, others in each epoch. Under ddp each process takes its own part of every cut. Validation, test and
    prediction: all validation images in order.

    Shape:
        batches: (image_BTD, label_B): float32 [B, 8, 8] in [0, 1] and int64 [B] in [0, 10).

    Args:
        batch_size: B, images in a batch (of each process).
        validation_fraction: the part of the images that is held out, in (0, 1), rounded to whole images.
        seed: seed of the split and of the order of training images, >= 0.

    Attributes:
        class_names: the ten digits as text, by label. num_features: pixels of a row, 8.
        num_classes: 10. images_sha256: digest of all images and labels.

    Raises:
        DataError: a value is out of range, or a split is smaller than the number of classes or than a batch.
    """

    noun: ClassVar[str] = "image"
    is_picture: ClassVar[bool] = True

    def __init__(self, batch_size: int = 64, validation_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, seed=seed)
        check_fraction(validation_fraction=validation_fraction)
        self.save_hyperparameters({"batch_size": batch_size, "validation_fraction": validation_fraction, "seed": seed})
        self.batch_size = batch_size
        self.seed = seed
        self._validation_fraction = validation_fraction
        self._load()

    def _load(self) -> None:
        # Takes seconds to import, which only this data needs.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.num_classes = len(self.class_names)
        self.num_features = digits.images.shape[-1]
        pixels, labels = digits.images.astype("<f4"), digits.target.astype("<i8")
        self.images_sha256 = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
        num_images = len(digits.target)
        num_validation = round(num_images * self._validation_fraction)
        for split, count in (("training", num_images - num_validation), ("validation", num_validation)):
            if count < self.num_classes:
                raise DataError(f"number of {split} images ({count}) must be >= classes ({self.num_classes})")
        if self.batch_size > num_images - num_validation:
            raise DataError(f"batch_size ({self.batch_size}) must be <= training images ({num_images - num_validation})")
        train_idx, validation_idx = train_test_split(
            np.arange(num_images), test_size=num_validation, stratify=digits.target, random_state=self.seed
        )
        image_NTD = torch.from_numpy(digits.images.astype(np.float32) / np.float32(MAX_PIXEL))
        label_N = torch.from_numpy(digits.target.astype(np.int64))
        self._train = (image_NTD[train_idx], label_N[train_idx])
        self._validation = (image_NTD[validation_idx], label_N[validation_idx])

    def train_dataloader(self) -> ResumableLoader[ImageBatch]:
        """Whole batches of each epoch's permutation, resumable within an epoch."""
        settings: dict[str, int | str] = {"images_sha256": self.images_sha256}
        return permuted_loader(*self._train, "images", self.batch_size, self.seed, settings, self.trainer)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All validation images once, in order; the last batch may be smaller."""
        return evaluation_loader(*self._validation, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same images as validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same images as validation."""
        return self.val_dataloader()

    @override
    def facts(self) -> dict[str, str]:
        return {"data": "validation images of the handwritten digits; a token is one row of an image"}

    @override
    def written(self, x: Tensor) -> list[str]:
        """Each row of an image as shades of characters."""
        levels = (x.clamp(0, 1) * (len(SHADES) - 1)).round().to(torch.int64).tolist()
        return ["".join(SHADES[level] * 2 for level in row) for row in levels]
