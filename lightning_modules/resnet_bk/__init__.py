"""Training as the ResNet-BK interface names it: thin layers over Lightning, checkpoints and the configuration parser."""

from lightning_modules.resnet_bk.checkpoint_manager import CheckpointManager
from lightning_modules.resnet_bk.config import ConfigError, ConfigLoader, ModelConfig, TrainingConfig
from lightning_modules.resnet_bk.trainer import Trainer

__all__ = ["CheckpointManager", "ConfigError", "ConfigLoader", "ModelConfig", "Trainer", "TrainingConfig"]
