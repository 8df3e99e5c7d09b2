"""What all DataModules of activations share: batches that come from a stream, which keeps its place.

Shapes: N tokens of a batch, D width of the activations, O width of the targets.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.data.loader import ResumableLoader, rank_and_world_size
from lightning_modules.errors import DataError

if TYPE_CHECKING:  # reading dumps needs pydantic, which is an extra
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.manifest import Identity
    from trix.superposition.dump.reader import HeldOut

ActivationBatch = tuple[Tensor, Tensor]
Part = Literal["training", "validation"]
SPLIT = "documents"  # what is held out whole


class Rows(NamedTuple):
    """dump, target: the activations, and those that a transcoder writes. held_out, seed: what training has not seen, as in
    :meth:`~trix.superposition.dump.ActivationDump.chunks`."""

    dump: "ActivationDump"
    target: "ActivationDump | None"
    held_out: "HeldOut"
    seed: int

    @property
    def target_dump(self) -> "ActivationDump":
        """The dump whose activations are to be written: the target, where there is one."""
        return self.dump if self.target is None else self.target


def trained_on(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the training batches that a checkpoint's run has seen; None where it holds no state of its training."""
    try:
        settings = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["settings"]
    except (KeyError, IndexError, TypeError):
        return None
    return settings if isinstance(settings, Mapping) else None


class ActivationStream(TrixDataModule):
    """Training: the whole batches of each epoch's order, resumable within an epoch. Validation, test and prediction: the rows
    that are held out, once.

    A subclass says what :meth:`batches` are, and calls :meth:`set_sizes` at the end of its ``__init__``.

    Shape:
        batches: (x_ND, target_NO), float32.

    Attributes:
        batch_size: N. num_features, num_outputs: D and O. has_target: whether the target is another tensor than x.

    Raises:
        DataError: fewer training rows than a batch, several processes, or a checkpoint whose run held out something else.
    """

    noun: ClassVar[str] = "token"
    batch_size: int
    num_features: int
    num_outputs: int
    has_target: bool = False

    def set_sizes(self, num_training: int, num_validation: int | None) -> None:
        """Rows of each part; None: not known before they are read."""
        if num_training < self.batch_size:
            raise DataError(f"batch_size ({self.batch_size}) must be <= training tokens ({num_training})")
        self._num_batches = num_training // self.batch_size
        self._num_validation_batches = None if num_validation is None else -(-num_validation // self.batch_size)
        self._place: tuple[int, int] | None = None  # epoch and number of the batch that comes next from the stream
        self._stream: Iterator[ActivationBatch] = iter(())

    @abstractmethod
    def batches(self, part: Part, epoch: int, start: int = 0) -> Iterator[ActivationBatch]:
        """The batches of a part in the order of an epoch, from a batch on; validation always begins with its first."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Digests of what the activations are of; a run can only be judged on the same."""

    @abstractmethod
    def order(self) -> dict[str, int | str]:
        """The settings on which the order of the batches depends, besides the identity."""

    def train_dataloader(self) -> ResumableLoader[ActivationBatch]:
        """Whole batches of each epoch's order, resumable within an epoch."""
        if rank_and_world_size()[1] > 1:
            raise DataError(f"number of processes ({rank_and_world_size()[1]}) must be 1 with {type(self).__name__}")
        settings = {**self.identity(), **self.order(), "split": SPLIT}
        return ResumableLoader(self._training_batch, self._num_batches, settings, self.trainer)

    @abstractmethod
    def origin(self) -> "Identity":
        """Of which model, texts and site the activations are, and with which settings."""

    @abstractmethod
    def rows(self, num_tokens: int) -> AbstractContextManager[Rows]:
        """Rows that can be read in order, with their columns, as long as the context lasts. num_tokens: about how many are
        needed, half of them held out, where the model must run to compute them."""

    @override
    def check_resumed(self, checkpoint: Mapping[str, Any]) -> None:
        settings = trained_on(checkpoint)
        if settings is not None and settings.get("split") != SPLIT:
            raise DataError(
                f"split of the run's data ({settings.get('split', 'chunks of tokens')}) must be {SPLIT}: what is held out now "
                "is not what was held out when it was trained; train anew"
            )

    def val_dataloader(self) -> Iterable[ActivationBatch]:
        """All validation tokens once; the last batch may be smaller."""
        return _Batches(self) if self._num_validation_batches is None else _SizedBatches(self, self._num_validation_batches)

    def test_dataloader(self) -> Iterable[ActivationBatch]:
        """The same tokens as validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Iterable[ActivationBatch]:
        """The same tokens as validation."""
        return self.val_dataloader()

    def _training_batch(self, epoch: int, batch_idx: int) -> ActivationBatch:
        """A pure function of its arguments; asked for in order, it reads each row once."""
        if self._place != (epoch, batch_idx):
            self._stream = self.batches("training", epoch, batch_idx)
        self._place = (epoch, batch_idx + 1)
        return next(self._stream)


class _Batches:
    """The validation batches, anew each time they are iterated over."""

    def __init__(self, data: ActivationStream) -> None:
        self._data = data

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self._data.batches("validation", epoch=0)


class _SizedBatches(_Batches):
    """The same where their number is known beforehand."""

    def __init__(self, data: ActivationStream, num_batches: int) -> None:
        super().__init__(data)
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches
