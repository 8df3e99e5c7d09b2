"""Classification of sequences."""

from collections.abc import Sequence
from dataclasses import asdict

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.tasks.routed_task import (
    Batch,
    LRSchedulerCallable,
    OptimizerCallable,
    RoutedTask,
    as_config,
    default_lr_scheduler,
)
from trix.nn import Classifier, ClassifierConfig


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
