"""The configuration of a ResNet-BK model and its training: keys, types, defaults and limits."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.error_text import did_you_mean, shorten_parser_error
from lightning_modules.errors import UserError
from lightning_modules.yaml_files import read_yaml
from trix.resnet_bk.config import ResNetBKConfig


class ConfigError(UserError, ValueError):
    """A configuration cannot be used: a key is unknown, or a value is of another type or out of range."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a :class:`Trainer` trains.

    Args:
        batch_size: examples in a batch. learning_rate: that of the optimizer's first group; the others keep their ratio to it.
        num_epochs: passes over the training data. warmup_steps: steps in which the rate grows in proportion to the step's
            number, to what optimizer and scheduler say; 0 for none.
        gradient_clip_norm: largest norm of all gradients, to which larger ones are scaled down; 0 for no limit.
        gradient_checkpointing: compute the blocks of the model (the members of its nn.ModuleLists) again in the backward pass,
            rather than keep what they computed. gradient_accumulation_steps: batches whose gradients make one step.
        mixed_precision: matrix products in bfloat16 (float16 on a GPU without it).
        log_interval, eval_interval, save_interval: steps between two entries of the history, two evaluations, and two
            checkpoints.

    Raises:
        ValueError: a number that must be positive is not; warmup_steps or gradient_clip_norm < 0.
    """

    batch_size: int = 8
    learning_rate: float = 1e-3
    num_epochs: int = 3
    warmup_steps: int = 100
    gradient_clip_norm: float = 1.0
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    mixed_precision: bool = True
    log_interval: int = 50
    eval_interval: int = 500
    save_interval: int = 1000

    def __post_init__(self) -> None:
        _check_at_least_1(self, "batch_size", "num_epochs", "gradient_accumulation_steps")
        _check_at_least_1(self, "log_interval", "eval_interval", "save_interval")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate ({self.learning_rate}) must be > 0 and finite")
        for name in ("warmup_steps", "gradient_clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be >= 0 and finite")


SECTIONS: dict[str, type[ResNetBKConfig] | type[TrainingConfig]] = {"model": ResNetBKConfig, "training": TrainingConfig}


class ConfigLoader:
    """Read and check a configuration of two sections, ``model`` (:class:`~trix.resnet_bk.ResNetBKConfig`) and ``training``.

    As in every configuration of this project, an unknown key is an error, and a number is read as one: ``1e-3``, which YAML 1.1
    takes for text, is 0.001.
    """

    @staticmethod
    def load(config_path: Path | str) -> dict[str, dict[str, Any]]:
        """Both sections of a YAML file, with the defaults of the keys that it leaves out.

        Raises:
            ConfigError: see :meth:`validate`. UserError: the file cannot be read, or is no YAML.
        """
        return _parsed(read_yaml(config_path), Path(config_path))

    @staticmethod
    def validate(config: Mapping[str, Any]) -> bool:
        """True; what is wrong is an error that says so.

        Raises:
            ConfigError: an unknown key (with the nearest one), a value of another type, or one out of range.
        """
        _parsed(config)
        return True


def training_config(values: Mapping[str, Any]) -> TrainingConfig:
    """The section ``training``, from some of its keys; ConfigError as :meth:`ConfigLoader.validate`."""
    return TrainingConfig(**_parsed({"training": dict(values)})["training"])


def _parsed(config: Any, source: Path | None = None) -> dict[str, dict[str, Any]]:
    place = "" if source is None else f"{source}: "
    sections = {} if config is None else config
    for name, section in {"the configuration": sections, **(sections if isinstance(sections, Mapping) else {})}.items():
        if section is not sections and name not in SECTIONS:
            raise ConfigError(f"{place}unknown key {name!r}{did_you_mean(str(name), SECTIONS)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{place}{name} must be keys and values, got {section!r:.80}")
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    try:
        found = parser.parse_object({name: dict(section) for name, section in sections.items()}).as_dict()
    except argparse.ArgumentError as error:
        known = [*SECTIONS, *(f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind))]
        files = [] if source is None else [source]
        raise ConfigError(shorten_parser_error(str(error), known, (), files)) from error
    try:
        for name, kind in SECTIONS.items():
            kind(**found[name])
    except ValueError as error:
        raise ConfigError(f"{place}{error}") from error
    return {name: found[name] for name in SECTIONS}


def _check_at_least_1(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be >= 1")
