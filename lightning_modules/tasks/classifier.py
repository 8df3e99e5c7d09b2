"""Classification of sequences."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy

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

    Logged: ``train/loss``, ``val/loss``, ``val/accuracy`` (share of correct predictions); the same under ``test/``.

    Shape:
        batches: (x_BTF, label_B): float [B, T, num_features] and int64 in [0, num_classes).

    Args:
        num_features: width of a token. num_classes: number of classes.
        class_names: what the labels mean; None names them by their numbers.
        network: size and kind of the network.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and trainer.max_steps; stepped every step.

    Raises:
        ValueError: the number of class_names is not num_classes, and as Classifier.
    """

    task_name = "classifier"
    network: Classifier

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        network: ClassifierConfig = ClassifierConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = default_lr_scheduler,
    ) -> None:
        if not isinstance(num_classes, int):  # the data that the command line took it from has none
            raise ValueError(f"num_classes ({num_classes}) must be an int: a classifier needs data with classes")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"number of class_names ({len(class_names)}) must equal num_classes ({num_classes})")
        network = as_config(ClassifierConfig, network)
        super().__init__(Classifier(num_features, num_classes, network), optimizer, lr_scheduler)
        self.class_names = tuple(str(index) for index in range(num_classes)) if class_names is None else tuple(class_names)
        # "macro" averages over classes; "micro" is the share of all images, as people expect of an accuracy.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.save_hyperparameters(
            {
                "num_features": num_features,
                "num_classes": num_classes,
                "class_names": list(self.class_names),
                "network": asdict(network),
            }
        )

    def update_metrics(self, logits: Tensor, label: Tensor) -> None:
        self.accuracy.update(logits, label)

    def compute_metrics(self) -> dict[str, Tensor]:
        return {"accuracy": self.accuracy.compute()}

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.accuracy.reset()

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """The most probable label, int64 [B], and the probability of every class, [B, C]."""
        probability = torch.softmax(self(batch[0]), dim=-1)
        return {"label": probability.argmax(dim=-1), "probability": probability}
