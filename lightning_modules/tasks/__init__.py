"""What networks learn: one LightningModule a file, and how their checkpoints are read."""

from lightning_modules.tasks.checkpoint import check_finite, check_resumable, load_checkpoint, load_weights, read_checkpoint
from lightning_modules.tasks.classifier import ClassifierTask
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.routed_task import CheckpointError, RoutedTask, StepOutput

__all__ = [
    "CheckpointError",
    "ClassifierTask",
    "LanguageModelTask",
    "RoutedTask",
    "StepOutput",
    "check_finite",
    "check_resumable",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
]
