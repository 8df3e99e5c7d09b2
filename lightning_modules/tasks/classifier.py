"""Classification of sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_modules.data.data_module import RunData
from lightning_modules.errors import DataError, UserError
from lightning_modules.tasks.answers import Example, Exporter, Page, Request
from lightning_modules.tasks.checkpoint import check_blocks, check_head
from lightning_modules.tasks.ngram_counts import count_training_text
from lightning_modules.tasks.routed_task import Batch, RoutedTask, as_config
from lightning_modules.tasks.task import LRSchedulerCallable, OptimizerCallable, default_lr_scheduler
from lightning_modules.tasks.token_ids import characters, check_length, check_token_ids
from trix.nn import PADDING_TOKEN, Classifier, ClassifierConfig


class ClassifierTask(RoutedTask):
    """Train a Classifier by cross entropy, in nats.

    Logged: ``train/loss``, ``val/loss``, ``val/accuracy`` (share of correct predictions), ``val/macro_accuracy`` (mean over
    classes of the share of a class's examples); the same under ``test/``.

    Shape:
        batches: (x, label_B): float [B, T, num_features], or int64 [B, T] in [0, len(vocabulary)) where 0 is padding; and int64
        in [0, num_classes).

    Args:
        num_features: width of a token; None where tokens are characters. num_classes: number of classes.
        class_names: what the labels mean; None names them by their numbers.
        network: size and kind of the network.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and trainer.max_steps; stepped every step.
        vocabulary: the characters, in the order of their token ids, the first of them a stand-in for padding; None where tokens
            are vectors.

    Raises:
        ValueError: the number of class_names is not num_classes, and as Classifier.
    """

    task_name = "classifier"
    network: Classifier

    def __init__(
        self,
        num_features: int | None,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        network: ClassifierConfig = ClassifierConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = default_lr_scheduler,
        vocabulary: str | None = None,
    ) -> None:
        if not isinstance(num_classes, int):  # the data that the command line took it from has none
            raise ValueError(f"num_classes ({num_classes}) must be an int: a classifier needs data with classes")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"number of class_names ({len(class_names)}) must equal num_classes ({num_classes})")
        network = as_config(ClassifierConfig, network)
        vocab_size = None if vocabulary is None else len(vocabulary)
        super().__init__(Classifier(num_features, num_classes, network, vocab_size), optimizer, lr_scheduler)
        self.vocabulary = vocabulary
        self.class_names = tuple(str(index) for index in range(num_classes)) if class_names is None else tuple(class_names)
        # "micro" is the share of all examples, as people expect of an accuracy; it says little of a rare class.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.macro_accuracy = MulticlassAccuracy(num_classes, average="macro")
        self.save_hyperparameters(
            {
                "num_features": num_features,
                "num_classes": num_classes,
                "class_names": list(self.class_names),
                "network": asdict(network),
                "vocabulary": vocabulary,
            }
        )

    @override
    def check_data(self, datamodule: L.LightningDataModule) -> None:
        length, limit = getattr(datamodule, "context_length", 0), self.network.config.context_length
        if length > limit:
            raise UserError(f"data.context_length ({length}) must be <= network.context_length ({limit})")
        num_features = self.hparams["num_features"]
        width = getattr(datamodule, "num_features", num_features)
        if width != num_features:
            raise DataError(f"number of features of the data ({width}) must equal the task's ({num_features})")
        vocabulary = getattr(datamodule, "vocabulary", self.vocabulary)
        if vocabulary != self.vocabulary:
            sizes = [0 if text is None else len(text) for text in (vocabulary, self.vocabulary)]
            raise DataError(
                f"the texts' vocabulary ({sizes[0]} characters) must equal the checkpoint's "
                f"({sizes[1]} characters): the texts have changed since the training"
            )
        num_classes = getattr(datamodule, "num_classes", len(self.class_names))
        if num_classes != len(self.class_names):
            raise DataError(f"number of classes of the data ({num_classes}) must equal the task's ({len(self.class_names)})")

    @classmethod
    @override
    def check_sizes(cls, settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        check_blocks(settings, state_dict)
        check_head(settings, state_dict)

    @override
    def example(self, data: RunData, request: Request) -> Example:
        """A text of the user's; of tokens that are vectors, one example of the validation data. Both with the prediction."""
        if self.vocabulary is not None:
            return self._text(self.vocabulary, request.prompt)
        if request.index is None:
            raise UserError(f"a classifier needs one of its validation {data.noun}s: --index N")
        x_BTF, label_B = data.example(request.index)
        self._check_inputs(x_BTF)
        found = "" if label_B is None else f": a {self.class_names[int(label_B)]}"
        subject = f"{data.noun} {request.index}{found}, taken for a {self._prediction(x_BTF)}"
        return Example(x_BTF, data.written(x_BTF[0]), subject)

    def _text(self, vocabulary: str, prompt: str | None) -> Example:
        if prompt is None:
            raise UserError("a classifier of texts needs one: --prompt TEXT")
        from lightning_modules.data.language_id import encode
        from lightning_modules.data.translations import plain_text

        prompt = plain_text(prompt)
        check_length(prompt, self.network.config.context_length)
        token_BT = encode([prompt], vocabulary, len(prompt))
        subject = f"prompt, taken for {self._prediction(token_BT)!r}"
        return Example(token_BT, [repr(character) for character in prompt], subject)

    def _prediction(self, x: Tensor) -> str:
        return self.class_names[int(self.predict_step((x, torch.zeros(1, dtype=torch.int64)))["label"])]

    @override
    def page(self, data: RunData, num_tokens: int) -> Page:
        """Held-out examples with their classes."""
        x, label_B = data.held_out(num_tokens)
        self._check_inputs(x)
        tokens: list[list[str]] | None
        counted = None
        if self.vocabulary is not None:
            names = ["", *self.vocabulary[1:]]  # token 0 is padding
            tokens = characters(x, names)
            counted = count_training_text(self.network, data, names, self.network.config.context_length, PADDING_TOKEN)
        else:
            tokens = None if data.is_picture and label_B is not None else [data.written(x_TF) for x_TF in x]
        return Page(self.network, x, data.facts(), tokens, label_B, self.class_names, counted)

    @override
    def exportable(self, data: RunData, num_tokens: int) -> Exporter:
        """With the names of the classes: see :func:`ort_ops.export.export_classifier`."""
        from ort_ops.export import export_classifier

        x, _ = data.held_out(num_tokens)
        self._check_inputs(x)
        return partial(export_classifier, self.network, list(self.class_names), x, vocabulary=self.vocabulary)

    def _check_inputs(self, x: Tensor) -> None:
        """Raise DataError unless the network takes the inputs."""
        limit, num_features = self.network.config.context_length, self.hparams["num_features"]
        if self.vocabulary is not None:
            check_token_ids(x, self.vocabulary, limit)
        elif not x.is_floating_point() or x.dim() != 3 or x.shape[-1] != num_features or not 1 <= x.shape[1] <= limit:
            rule = f"must be float [B, T, {num_features}] with T >= 1 and <= context_length ({limit})"
            raise DataError(f"inputs of the data ({x.dtype} {tuple(x.shape)}) {rule}")

    @override
    def padding_mask(self, x: Tensor) -> Tensor | None:
        return self.network.padding_mask(x)

    def update_metrics(self, logits: Tensor, label: Tensor) -> None:
        self.accuracy.update(logits, label)
        self.macro_accuracy.update(logits, label)

    def compute_metrics(self) -> dict[str, Tensor]:
        return {"accuracy": self.accuracy.compute(), "macro_accuracy": self.macro_accuracy.compute()}

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.accuracy.reset()
        self.macro_accuracy.reset()

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """The most probable label, int64 [B], and the probability of every class, [B, C]."""
        probability = torch.softmax(self(batch[0]), dim=-1)
        return {"label": probability.argmax(dim=-1), "probability": probability}
