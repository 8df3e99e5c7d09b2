"""The configuration of a ResNet-BK model and its training: keys, types, defaults and limits."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.error_text import did_you_mean, shorten_parser_error
from lightning_modules.errors import UserError
from lightning_modules.tasks.resnet_bk import ResNetBKTask
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


MIXED = frozenset({"16", "bf16", "16-mixed", "bf16-mixed"})  # precisions of Lightning
SECTIONS: dict[str, type[ResNetBKConfig] | type[TrainingConfig]] = {"model": ResNetBKConfig, "training": TrainingConfig}


class ConfigLoader:
    """Read and check a configuration of two sections, ``model`` (:class:`~trix.resnet_bk.ResNetBKConfig`) and ``training``
    (:class:`TrainingConfig`).

    As in every configuration of this project, an unknown key is an error, and a number is read as one: ``1e-3``, which YAML 1.1
    takes for text, is 0.001.
    """

    @staticmethod
    def load(config_path: Path | str) -> dict[str, dict[str, Any]]:
        """Both sections of a YAML file, with the defaults of the keys that it leaves out.

        A file for ``trix fit`` with a ResNetBKTask, such as configs/resnet_bk.yaml, stands for the two sections too. What it
        leaves out is as in ``trix fit``; where that gives no number (of epochs, or of steps between two evaluations or
        checkpoints), it is the default of TrainingConfig. What has no key in the sections is not taken over, such as max_steps,
        and vocab_size, which comes from the data there.

        Raises:
            ConfigError: see :meth:`validate`; a file for ``trix fit`` with another task. UserError: the file cannot be read, is
            no YAML, or ``trix fit`` would refuse it.
        """
        content, path = read_yaml(config_path), Path(config_path)
        return _parsed(_sections_of_fit(path) if _is_for_fit(content) else content, path)

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


def _is_for_fit(content: Any) -> bool:
    """Whether its model is a class, rather than the keys of one."""
    model = content.get("model") if isinstance(content, Mapping) else None
    return isinstance(model, str) or (isinstance(model, Mapping) and "class_path" in model)


def _sections_of_fit(path: Path) -> dict[str, dict[str, Any]]:
    """The two sections that a file for ``trix fit`` stands for."""
    from lightning_modules.lightning_cli import fit_settings  # it loads the parts of every run, which nothing else here needs

    settings = fit_settings(path)
    task, trainer, data = settings["model"], settings["trainer"], settings["data"].get("init_args", {})
    if task["class_path"].rpartition(".")[2] != ResNetBKTask.__name__:
        raise ConfigError(f"{path}: model.class_path ({task['class_path']}) must be {ResNetBKTask.__name__}")
    given, num_batches = task["init_args"], trainer["accumulate_grad_batches"]
    evaluated = trainer["val_check_interval"]  # in batches; a float is a part of an epoch
    callbacks = trainer["callbacks"] if isinstance(trainer["callbacks"], list) else []
    saved = [callback.get("init_args", {}).get("every_n_train_steps") for callback in callbacks]
    training = {
        "batch_size": data.get("batch_size"),
        "learning_rate": given["learning_rate"],
        "num_epochs": trainer["max_epochs"],
        "warmup_steps": given["warmup_steps"],
        "gradient_clip_norm": trainer["gradient_clip_val"] or 0.0,
        "gradient_checkpointing": given["gradient_checkpointing"],
        "gradient_accumulation_steps": num_batches,
        "mixed_precision": str(trainer["precision"]) in MIXED,
        "log_interval": trainer["log_every_n_steps"],
        "eval_interval": max(evaluated // num_batches, 1) if isinstance(evaluated, int) else None,
        "save_interval": next(filter(None, saved), None),
    }
    return {"model": given["network"], "training": {key: value for key, value in training.items() if value is not None}}


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
