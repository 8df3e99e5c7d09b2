"""Keep what a network predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich import get_console
from torch import Tensor
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.whole_files import save_whole


class PredictionWriter(BasePredictionWriter):
    """Write the predictions of ``trix predict`` to one file: a dict of tensors, concatenated over batches.

    ``torch.load(path, weights_only=True)`` reads it. With several processes each writes its own part, with its rank before the
    suffix of the name.

    Args:
        output: the file; replaced whole, at the end.

    ``trix predict`` adds one where the configuration has none.

    Example::

        trainer:
          callbacks+:
          - class_path: PredictionWriter
            init_args: {output: predictions.pt}
    """

    def __init__(self, output: Path | str = "predictions.pt") -> None:
        interval: Literal["epoch"] = "epoch"
        super().__init__(interval)
        self.output = Path(output)

    @override
    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        output = self.output
        if trainer.world_size > 1:
            output = output.with_suffix(f".rank{trainer.global_rank}{output.suffix}")
        joined = {name: torch.cat(parts).cpu() for name, parts in _by_name(predictions, type(pl_module).__name__).items()}
        save_whole(joined, output)
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in joined.items())
        get_console().print(f"wrote   {output}: {shapes}", highlight=False, markup=False, soft_wrap=True)


def _by_name(predictions: Sequence[Any], kind: str) -> dict[str, list[Tensor]]:
    """The predictions of all batches; those without a name are called "prediction".

    Raises:
        UserError: they are neither tensors nor dicts of tensors.
    """
    batches = [{"prediction": batch} if isinstance(batch, Tensor) else batch for batch in predictions]
    for batch in batches:
        if not isinstance(batch, dict) or not all(isinstance(value, Tensor) and value.dim() for value in batch.values()):
            raise UserError(f"predict_step of {kind} ({type(batch).__name__}) must return a tensor [B, ...] or a dict of them")
    return {name: [batch[name] for batch in batches] for name in batches[0]}
