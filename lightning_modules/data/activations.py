"""Activations of a model, read from a dump in shuffled order and bounded memory.

Shapes: N tokens of a batch, D width of the activations, O width of the targets.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_modules.data.activation_stream import ActivationBatch, ActivationStream, Part, Rows
from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.errors import DataError

if TYPE_CHECKING:  # reading dumps needs pydantic, which is an extra
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.manifest import Identity


class ActivationDataModule(ActivationStream):
    """The tokens of a dump, one row each, as ``trix dump`` or :func:`trix.superposition.dump.dump_sites` wrote it.

    Training: whole batches of an order drawn from (seed, epoch); about 65000 rows are in memory at a time, whatever the size
    of the dump. Validation, test and prediction: the rows of the documents that are held out, in one order. No document is in
    both parts.

    Shape:
        batches: (x_ND, target_NO), float32; the target is x itself, or the same tokens in ``target``.

    Args:
        path: folder of the dump. target: folder of a second one, of the same tokens at another site, which a transcoder is to
            write.
        batch_size: N, tokens in a batch. validation_fraction: the share of the documents that is held out, in (0, 1).
        seed: seed of the split and of the order, >= 0.

    Attributes:
        dump: that of path. num_features, num_outputs: D and O. has_target: whether there is a ``target``. dump_sha256: digest
            of the manifest.

    Raises:
        DataError: no complete dump, one that does not fit its manifest, targets of other tokens, a value out of range, fewer
            rows than a batch, or several processes.
    """

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
        self.dump, self.has_target = _opened(path, "path"), target is not None
        self._target = None if target is None else _opened(target, "target")
        if self._target is not None and not _have_equal_tokens(self.dump, self._target):
            raise DataError(f"tokens of target ({target}) must be those of path ({path}): dump both sites at once")
        self.num_features = self.dump.manifest.d_model
        self.num_outputs = self.num_features if self._target is None else self._target.manifest.d_model
        self.dump_sha256 = hashlib.sha256(self.dump.manifest.model_dump_json().encode()).hexdigest()
        with _told(path):
            num_rows = {part: self.dump.num_rows(part, validation_fraction, seed) for part in ("training", "validation")}
            num_documents = len(self.dump.held_out_documents(validation_fraction, seed))
        if num_documents == 0:
            raise DataError(
                f"documents of {path} that are held out (0 of {self.dump.manifest.documents}, validation_fraction "
                f"{validation_fraction}) must be >= 1"
            )
        self.set_sizes(num_rows["training"], num_rows["validation"])

    @override
    def facts(self) -> dict[str, str]:
        identity = self.dump.manifest.identity
        return {"data": f"activations at {identity.site}.{identity.layer} of a model with digest {identity.model}"}

    @override
    def origin(self) -> "Identity":
        return self.dump.manifest.identity

    @override
    def rows(self, num_tokens: int) -> AbstractContextManager[Rows]:
        return nullcontext(Rows(self.dump, self._target, self.validation_fraction, self.seed))

    @override
    def identity(self) -> dict[str, str]:
        return {"dump_sha256": self.dump_sha256}

    @override
    def order(self) -> dict[str, int | str]:
        return {"batch_size": self.batch_size, "seed": self.seed, "validation_fraction": str(self.validation_fraction)}

    @override
    def batches(self, part: Part, epoch: int, start: int = 0) -> Iterator[ActivationBatch]:
        streams = [
            dump.shuffled(self.batch_size, self.seed, epoch, start, part=part, held_out=self.validation_fraction)
            for dump in (self.dump, self._target)
            if dump is not None
        ]
        with _told(str(self.dump.folder)):
            for columns in zip(*streams, strict=True):
                yield columns[0]["acts"], columns[-1]["acts"]


def _opened(path: str, key: str) -> "ActivationDump":
    try:
        from trix.superposition.dump import ActivationDump
    except ImportError as error:
        raise DataError(f"{error.name} must be installed to read activations: pip install 'trix[superposition]'") from error
    if not Path(path).exists():
        raise DataError(f"dump {path} must exist: --data.{key} DIR says where it is")
    with _told(path):
        return ActivationDump(path)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Raise what reading a dump raises as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"dump {path} cannot be read: {error.strerror or error} ({error.filename})") from error
    except ValueError as error:
        raise DataError(str(error)) from error


def _have_equal_tokens(a: "ActivationDump", b: "ActivationDump") -> bool:
    """Whether the rows of two dumps belong to the same tokens."""
    ours, other = a.manifest, b.manifest
    of_same_run = ours.identity.model_copy(update={"layer": other.identity.layer, "site": other.identity.site})
    return of_same_run == other.identity and ours.tokens == other.tokens
