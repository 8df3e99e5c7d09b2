"""Activations of a model, read from a dump in shuffled order and bounded memory.

Shapes: N tokens of a batch, D width of the activations, O width of the targets.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.loader import ResumableLoader, rank_and_world_size
from lightning_modules.errors import DataError

if TYPE_CHECKING:  # reading dumps needs pydantic, which is an extra
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.reader import Part

ActivationBatch = tuple[Tensor, Tensor]
_PARTS: "tuple[Part, ...]" = ("training", "validation")


class ActivationDataModule(TrixDataModule):
    """The tokens of a dump, one row each, as ``trix dump`` or :func:`trix.superposition.dump.dump_sites` wrote it.

    Training: whole batches of an order drawn from (seed, epoch); about 65000 rows are in memory at a time, whatever the size
    of the dump. Validation, test and prediction: the rows that are held out, in one order. Held out are chunks of 256
    neighbouring rows, so that hardly a text is in both parts.

    Shape:
        batches: (x_ND, target_NO), float32; the target is x itself, or the same tokens in ``target``.

    Args:
        path: folder of the dump. target: folder of a second one, of the same tokens at another site, which a transcoder is to
            write.
        batch_size: N, tokens in a batch. validation_fraction: the part of the chunks that is held out, in (0, 1).
        seed: seed of the split and of the order, >= 0.

    Attributes:
        dump: that of path. num_features, num_outputs: D and O. has_target: whether there is a ``target``. dump_sha256: digest
            of the manifest.

    Raises:
        DataError: no complete dump, one that does not fit its manifest, targets of other tokens, a value out of range, fewer
            rows than a batch, or several processes.
    """

    noun = "token"

    def __init__(
        self,
        path: str,
        target: str | None = None,
        batch_size: int = 4096,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, seed=seed)
        check_fraction(validation_fraction=validation_fraction)
        self.save_hyperparameters(
            {
                "path": path,
                "target": target,
                "batch_size": batch_size,
                "validation_fraction": validation_fraction,
                "seed": seed,
            }
        )
        self.batch_size, self.seed, self.validation_fraction = batch_size, seed, validation_fraction
        self.dump, self.has_target = _opened(path), target is not None
        self._target = None if target is None else _opened(target)
        if self._target is not None and not _have_equal_tokens(self.dump, self._target):
            raise DataError(f"tokens of target ({target}) must be those of path ({path}): dump both sites at once")
        self.num_features = self.dump.manifest.d_model
        self.num_outputs = self.num_features if self._target is None else self._target.manifest.d_model
        self.dump_sha256 = hashlib.sha256(self.dump.manifest.model_dump_json().encode()).hexdigest()
        self._sizes = {part: self.dump.num_rows(part, validation_fraction, seed) for part in _PARTS}
        if self._sizes["training"] < batch_size:
            raise DataError(f"batch_size ({batch_size}) must be <= training tokens ({self._sizes['training']})")
        if self._sizes["validation"] == 0:
            raise DataError(f"number of validation tokens of {path} (0) must be >= 1: validation_fraction is too small")
        self._place: tuple[int, int] | None = None  # epoch and number of the batch that comes next from the stream
        self._stream: Iterator[ActivationBatch] = iter(())

    def train_dataloader(self) -> ResumableLoader[ActivationBatch]:
        """Whole batches of each epoch's order, resumable within an epoch."""
        if rank_and_world_size()[1] > 1:
            raise DataError(f"number of processes ({rank_and_world_size()[1]}) must be 1 with ActivationDataModule")
        settings: dict[str, int | str] = {
            "dump_sha256": self.dump_sha256,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "validation_fraction": str(self.validation_fraction),
        }
        num_batches = self._sizes["training"] // self.batch_size
        return ResumableLoader(self._training_batch, num_batches, settings=settings, trainer=self.trainer)

    def val_dataloader(self) -> Iterable[ActivationBatch]:
        """All validation tokens once; the last batch may be smaller."""
        return _Batches(self, -(-self._sizes["validation"] // self.batch_size))

    def test_dataloader(self) -> Iterable[ActivationBatch]:
        """The same tokens as validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Iterable[ActivationBatch]:
        """The same tokens as validation."""
        return self.val_dataloader()

    @property
    def target_dump(self) -> "ActivationDump":
        """The dump whose activations are to be written: that of ``target``, or of ``path``."""
        return self.dump if self._target is None else self._target

    @override
    def facts(self) -> dict[str, str]:
        identity = self.dump.manifest.identity
        return {"data": f"activations at {identity.site}.{identity.layer} of a model with digest {identity.model}"}

    def batches(self, part: "Part", epoch: int, start: int = 0) -> Iterator[ActivationBatch]:
        """The batches of a part in the order of an epoch, from a batch on."""
        streams = [
            dump.shuffled(self.batch_size, self.seed, epoch, start, part=part, held_out=self.validation_fraction)
            for dump in (self.dump, self._target)
            if dump is not None
        ]
        for columns in zip(*streams, strict=True):
            yield columns[0]["acts"], columns[-1]["acts"]

    def _training_batch(self, epoch: int, batch_idx: int) -> ActivationBatch:
        """A pure function of its arguments; asked for in order, it reads each row once."""
        if self._place != (epoch, batch_idx):
            self._stream = self.batches("training", epoch, batch_idx)
        self._place = (epoch, batch_idx + 1)
        return next(self._stream)


class _Batches:
    """The validation batches, anew each time they are iterated over."""

    def __init__(self, data: ActivationDataModule, num_batches: int) -> None:
        self._data, self._num_batches = data, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self._data.batches("validation", epoch=0)


def _opened(path: str) -> "ActivationDump":
    try:
        from trix.superposition.dump import ActivationDump
    except ImportError as error:
        raise DataError(f"{error.name} must be installed to read activations: pip install 'trix[superposition]'") from error
    try:
        return ActivationDump(path)
    except OSError as error:
        raise DataError(f"dump {path} cannot be read: {error.strerror or error} ({error.filename})") from error
    except ValueError as error:
        raise DataError(str(error)) from error


def _have_equal_tokens(a: "ActivationDump", b: "ActivationDump") -> bool:
    """Whether the rows of two dumps belong to the same tokens."""
    ours, other = a.manifest, b.manifest
    of_same_run = ours.identity.model_copy(update={"layer": other.identity.layer, "site": other.identity.site})
    return of_same_run == other.identity and ours.tokens == other.tokens
