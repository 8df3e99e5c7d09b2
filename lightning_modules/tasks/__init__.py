"""What networks learn: one LightningModule a file, and how their checkpoints are read."""

from lightning_modules.tasks.answers import Example, Exporter, Page, Request
from lightning_modules.tasks.checkpoint import check_finite, check_resumable, load_checkpoint, load_weights, read_checkpoint
from lightning_modules.tasks.classifier import ClassifierTask
from lightning_modules.tasks.hub import load_pretrained
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.resnet_bk import ResNetBKTask
from lightning_modules.tasks.routed_task import RoutedTask, StepOutput
from lightning_modules.tasks.sparse_autoencoder import AutoencoderConfig, SparseAutoencoderTask, load_autoencoder
from lightning_modules.tasks.task import CheckpointError, LRSchedulerCallable, OptimizerCallable, TrixTask

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "ClassifierTask",
    "Example",
    "Exporter",
    "LRSchedulerCallable",
    "LanguageModelTask",
    "OptimizerCallable",
    "Page",
    "Request",
    "ResNetBKTask",
    "RoutedTask",
    "SparseAutoencoderTask",
    "StepOutput",
    "TrixTask",
    "check_finite",
    "check_resumable",
    "load_autoencoder",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "read_checkpoint",
]
