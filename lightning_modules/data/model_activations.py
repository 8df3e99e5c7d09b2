"""Activations of a model as it computes them, in shuffled order and bounded memory; no dump is written.

Shapes: N tokens of a batch, D width of the activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_modules.data.activation_stream import ActivationBatch, ActivationStream, Part, Rows
from lightning_modules.data.checks import check_at_least, check_fraction
from lightning_modules.errors import DataError
from lightning_modules.explained_model import LABEL, TEXT, frame_of, read_model, told_to_the_user

if TYPE_CHECKING:
    from trix.superposition.dump.manifest import Identity


class ModelActivationDataModule(ActivationStream):
    """The tokens of some texts, one row each, straight from a model: the rows that ``trix dump`` would write.

    An epoch has as many whole batches as the training texts have tokens for; where sinks or broken values are left out, texts
    read first come once more at its end. Held out for validation are whole batches of texts. Use it where the activations of a
    pass over the texts do not fit on the disk, or are needed once: each epoch runs the model again, and a run that is resumed
    within an epoch first computes again what the epoch has served. A dump costs the model once.

    Shape:
        batches: (x_ND, x_ND), float32.

    Args:
        model: a checkpoint, a run folder, or the folder of a model of Hugging Face. site: as ``resid_pre.2``.
        text: paragraphs of a file, or a .csv file with the columns text and label; None: num_tokens of what the model was
            trained on. num_tokens: of these. max_len: tokens of a text that are read, by default the model's context, or 128.
        text_batch: texts that the model reads at once. buffer_tokens: rows that are shuffled at once. drop_sinks: leave out the
            tokens in which attention gathers.
        batch_size: N. validation_fraction: share of the batches of texts that is held out, in (0, 1).
        seed: seed of the split and of the order, >= 0.

    Attributes:
        num_features, num_outputs: D. explained: the model. live: the rows. model_sha256, text_sha256: digests of the model, and
            of tokens and labels.

    Raises:
        DataError: a value out of range, fewer rows than a batch, or several processes. UserError: no such model, text or site.
    """

    def __init__(
        self,
        model: str,
        site: str,
        text: str | None = None,
        num_tokens: int = 200_000,
        max_len: int | None = None,
        text_batch: int = 64,
        buffer_tokens: int = 65536,
        drop_sinks: bool = True,
        batch_size: int = 4096,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, text_batch=text_batch, buffer_tokens=buffer_tokens, num_tokens=num_tokens)
        check_at_least(0, seed=seed)
        check_fraction(validation_fraction=validation_fraction)
        self.save_hyperparameters()
        self.batch_size, self.seed = batch_size, seed
        if not Path(model).exists():
            raise DataError(f"model {model} must exist: --data.model MODEL says where it is")
        with told_to_the_user(model):
            from trix.superposition.backends import Site
            from trix.superposition.dump.live import LiveActivations
            from trix.superposition.dump.texts import TokenizedTexts

            explained = read_model(model, "fit")
            self._max_len = length = explained.max_len(max_len)
            frame = frame_of(explained, text, num_tokens, length)
            texts = TokenizedTexts.from_frame(frame, TEXT, LABEL, explained.backend, length)
            self.live = LiveActivations(
                explained.backend,
                texts,
                Site.parse(site),
                text_batch,
                buffer_tokens,
                drop_sinks=drop_sinks,
                held_out=validation_fraction,
                seed=seed,
            )
        self.explained = explained
        self.num_features = self.num_outputs = self.live.d_model
        self.model_sha256, self.text_sha256 = explained.backend.digest(), texts.digest()
        self.set_sizes(self.live.num_tokens["training"], None)

    @override
    def facts(self) -> dict[str, str]:
        return {"data": f"activations at {self.live.site} of a model with digest {self.model_sha256}"}

    @override
    def origin(self) -> "Identity":
        return self.live.identity(self._max_len)

    @override
    @contextmanager
    def rows(self, num_tokens: int) -> Iterator[Rows]:
        with TemporaryDirectory(prefix="trix-activations-") as folder:
            dump, held_out = self.live.dump(Path(folder), num_tokens, self._max_len)
            yield Rows(dump, None, held_out, self.seed)

    @override
    def identity(self) -> dict[str, str]:
        return {"model_sha256": self.model_sha256, "text_sha256": self.text_sha256}

    @override
    def order(self) -> dict[str, int | str]:
        names = ("site", "text_batch", "buffer_tokens", "batch_size", "seed", "validation_fraction", "drop_sinks")
        return {name: str(self.hparams[name]) for name in names}

    @override
    def batches(self, part: Part, epoch: int, start: int = 0) -> Iterator[ActivationBatch]:
        if part == "training":
            stream = self.live.shuffled(self.batch_size, self.seed, epoch, start)
        else:
            stream = self.live.in_order(self.batch_size)
        return ((x_ND, x_ND) for x_ND in stream)
