"""Next-token prediction."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from typing_extensions import override

from lightning_modules.data.data_module import RunData
from lightning_modules.errors import DataError, UserError
from lightning_modules.tasks.answers import Example, Exporter, Page, Request
from lightning_modules.tasks.checkpoint import check_blocks
from lightning_modules.tasks.ngram_counts import count_training_text
from lightning_modules.tasks.routed_task import Batch, RoutedTask, as_config
from lightning_modules.tasks.task import LRSchedulerCallable, OptimizerCallable, default_lr_scheduler
from lightning_modules.tasks.token_ids import characters, check_length, check_token_ids
from trix.nn import LanguageModel, LanguageModelConfig


class LanguageModelTask(RoutedTask):
    """Train a LanguageModel to say the next character: mean cross entropy over all positions, in nats.

    Logged: ``train/loss``, ``val/loss``, ``val/perplexity`` = exp(val/loss); the same under ``test/``.

    Shape:
        batches: (token_BT, target_BT), both int64 in [0, len(vocabulary)).

    Args:
        vocabulary: the characters, in the order of their token ids.
        network: size and kind of the network.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and trainer.max_steps; stepped every step.

    Raises:
        ValueError: an empty vocabulary or one with a character twice, and as LanguageModel.
    """

    task_name = "language_model"
    length_key: ClassVar[str] = "network.context_length"  # what the configuration calls the longest sequence
    network: LanguageModel

    def __init__(
        self,
        vocabulary: str,
        network: LanguageModelConfig = LanguageModelConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = default_lr_scheduler,
    ) -> None:
        if not isinstance(vocabulary, str):  # the data that the command line took it from has none
            raise ValueError(f"vocabulary ({vocabulary}) must be a str: a language model needs data with a vocabulary")
        if not vocabulary or len(set(vocabulary)) != len(vocabulary):
            raise ValueError(
                f"vocabulary ({len(vocabulary)} characters, {len(set(vocabulary))} distinct) must be >= 1 distinct characters"
            )
        network = as_config(LanguageModelConfig, network)
        super().__init__(LanguageModel(len(vocabulary), network), optimizer, lr_scheduler)
        self.vocabulary = vocabulary
        self.save_hyperparameters({"vocabulary": vocabulary, "network": asdict(network)})

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels mean, by index: the characters, written so that spaces can be seen."""
        return tuple(repr(character) for character in self.vocabulary)

    @override
    def check_data(self, datamodule: L.LightningDataModule) -> None:
        num_classes = getattr(datamodule, "num_classes", None)
        if num_classes is not None:
            kind = type(datamodule).__name__
            raise UserError(f"the labels of {kind} ({num_classes} classes) must be next characters: use ClassifierTask")
        length, limit = getattr(datamodule, "context_length", 0), self.network.config.context_length
        if length > limit:
            raise UserError(f"data.context_length ({length}) must be <= {self.length_key} ({limit})")
        vocabulary = getattr(datamodule, "vocabulary", self.vocabulary)
        if vocabulary != self.vocabulary:
            raise DataError(
                f"the text's vocabulary ({len(vocabulary)} characters) must equal the checkpoint's "
                f"({len(self.vocabulary)} characters): the text has changed since the training"
            )

    @classmethod
    @override
    def check_sizes(cls, settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        check_blocks(settings, state_dict)

    @override
    def example(self, data: RunData, request: Request) -> Example:
        """A text of the user's, character by character."""
        if request.prompt is None:
            raise UserError("a language model needs a text: --prompt TEXT")
        check_length(request.prompt, self.network.config.context_length)
        unknown = sorted(set(request.prompt) - set(self.vocabulary))
        if unknown:
            raise UserError(f"the prompt holds {', '.join(map(repr, unknown[:5]))}, outside the vocabulary of the model")
        token_BT = torch.tensor([[self.vocabulary.index(character) for character in request.prompt]])
        return Example(token_BT, [repr(character) for character in request.prompt], "prompt")

    @override
    def page(self, data: RunData, num_tokens: int) -> Page:
        """Held-out text; each character is a class of its own."""
        token_BT = self._held_out(data, num_tokens)
        counted = count_training_text(self.network, data, self.vocabulary, self.network.config.context_length)
        return Page(self.network, token_BT, data.facts(), characters(token_BT, self.vocabulary), counted=counted)

    @override
    def exportable(self, data: RunData, num_tokens: int) -> Exporter:
        """With the state after the tokens before: see :func:`ort_ops.export.export_language_model`."""
        from ort_ops.export import export_language_model

        tokens = self._held_out(data, num_tokens).flatten()[:num_tokens]
        return partial(export_language_model, self.network, self.vocabulary, tokens)

    def _held_out(self, data: RunData, num_tokens: int) -> Tensor:
        token_BT, _ = data.held_out(num_tokens)
        return check_token_ids(token_BT, self.vocabulary, self.network.config.context_length)

    def compute_metrics(self) -> dict[str, Tensor]:
        return {"perplexity": self.mean_loss.compute().exp()}

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """After each token of the batch, the most probable next one and its probability, both [B, T]."""
        probability, next_token = torch.softmax(self(batch[0]), dim=-1).max(dim=-1)
        return {"next_token": next_token, "probability": probability}
