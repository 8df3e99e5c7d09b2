"""``trix fit``, ``validate``, ``test`` and ``predict``: LightningCLI with strict keys and errors in one line."""

import argparse
import inspect
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, capture_parser, get_loader, set_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.callbacks.log_folder import local_log_folder, relative_path
from lightning_modules.callbacks.prediction_writer import PredictionWriter
from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.callbacks.report_page import ReportPage
from lightning_modules.callbacks.run_notebook import RunNotebook
from lightning_modules.callbacks.run_record import ENVIRONMENT_NAME, METRICS_NAME, RunRecord
from lightning_modules.callbacks.run_report import RunReport, StepProgressBar
from lightning_modules.callbacks.stability import StabilityMonitor
from lightning_modules.class_paths import import_parts
from lightning_modules.data import activations as _activations  # noqa: F401
from lightning_modules.data import digits as _digits  # noqa: F401 (a configuration can name imported classes in short)
from lightning_modules.data import language_id as _language_id  # noqa: F401
from lightning_modules.data import model_activations as _model_activations  # noqa: F401
from lightning_modules.data import text as _text  # noqa: F401
from lightning_modules.data.data_module import TrixDataModule
from lightning_modules.error_text import one_line, reason, shorten_parser_error
from lightning_modules.errors import UserError
from lightning_modules.known_names import class_names, known_keys
from lightning_modules.quiet import quiet_lightning
from lightning_modules.resume import CONFIG_NAME, log_folder, resumed
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.tasks import TrixTask, check_resumable, read_checkpoint
from lightning_modules.tasks.checkpoint import load_weights
from lightning_modules.tasks.hyperparameters import check_hyperparameters
from lightning_modules.tasks.task import FROM_DATA, check_eps
from lightning_modules.tasks.upgrade import COPIES
from lightning_modules.trust import (
    check_classes,
    denied_import,
    named,
    named_on_command_line,
    only_trusted_imports,
    take_out_trust,
)
from lightning_modules.whole_files import WholeFileCheckpointIO
from lightning_modules.yaml_files import check_text, check_yaml, read_yaml

RESUME_HELP = (
    "--resume RUN goes on from the last checkpoint of a run folder, or from one file, as the run's own configuration says"
)
TRUST_HELP = (
    "--trust MODULE lets the configuration of a resumed run name classes of a module of your own; it may be given several\n"
    "times, and TRIX_TRUST=MODULE,MODULE does the same. What a file behind --config names is trusted as it is"
)
CKPT_EXAMPLE = "--ckpt_path runs/char_lm/version_0/checkpoints"
EXAMPLES = {
    "fit": [
        "fit --config configs/char_lm.yaml",
        "fit --config configs/char_lm.yaml --trainer.max_steps 100 --print_config",
        f"fit --config configs/char_lm.yaml {CKPT_EXAMPLE}/last.ckpt",
        "fit --resume runs/char_lm",
    ],
    "validate": [f"validate --config configs/char_lm.yaml {CKPT_EXAMPLE}/best.ckpt"],
    "test": [f"test --config configs/digits.yaml {CKPT_EXAMPLE.replace('char_lm', 'digits')}/best.ckpt"],
    "predict": [f"predict --config configs/char_lm.yaml {CKPT_EXAMPLE}/best.ckpt"],
}
GIVE_CONFIG = "to have it so, give --config FILE"
SHORT_YAML = 1000  # characters, which cannot be nested too deeply
EXIT_TERMINATED = 128 + signal.SIGTERM


def training_actions(command: str) -> list[argparse.Action]:
    """The options of ``trix COMMAND``, for the completion."""
    parser = capture_parser(lambda: TrixCLI([command], given=[]))
    assert parser._subcommands_action is not None
    of_command: TrixParser = parser._subcommands_action.choices[command]
    return of_command._actions


def run_training_command(arguments: list[str]) -> int:
    """Run ``trix COMMAND OPTIONS``; returns the exit code.

    Raises:
        UserError: whatever the user can mend: a key, a value, a file, a setting that the trainer refuses.
    """
    trusted, rest = take_out_trust(arguments)
    trusted += named_on_command_line(rest, map(read_yaml, config_files(rest)))
    with quiet_lightning(), only_trusted_imports(trusted):
        try:
            resumed_run = resumed(rest)
            if resumed_run.config is not None:
                check_yaml(resumed_run.config)
            TrixCLI(resumed_run.arguments, given=arguments, own_config=resumed_run.config, trusted=trusted)
        except SIGTERMException:
            print("trix: terminated", file=sys.stderr)
            return EXIT_TERMINATED
        except UserError:
            raise
        except OSError as error:
            place = "" if error.filename is None else f"{relative_path(os.fsdecode(error.filename))}: "
            raise UserError(one_line(f"{place}{error.strerror or error}")) from error
        except (MisconfigurationException, ValueError) as error:
            raise UserError(one_line(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(one_line(f"out of memory: {error}")) from error
    return 0


_parse_yaml = get_loader("yaml")


def _parse_checked_yaml(text: str) -> Any:
    """Also checks the files that a configuration refers to, which the parser reads itself."""
    if "&" in text or len(text) > SHORT_YAML:
        check_text("configuration", text)
    return _parse_yaml(text)


set_loader("yaml", _parse_checked_yaml, exceptions=(yaml.YAMLError,))


class ParserError(Exception):
    """What jsonargparse says, at its length."""


class RunConfigSaver(SaveConfigCallback):
    """Save the configuration next to the logs; a run without logs leaves none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class HelpWithExamples(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of the examples as they are."""


class TrixParser(LightningArgumentParser):
    """Without abbreviations; it raises errors in place of printing its usage and leaving."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **(settings | {"formatter_class": HelpWithExamples}), allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ParserError(message) from ex


class TrixCLI(LightningCLI):
    """LightningCLI for TrixTasks.

    Differences: the task takes its vocabulary or classes (``FROM_DATA``) from the data; a checkpoint must be a file and fit the
    configuration, which is checked before anything is written; validate, test and predict need a checkpoint.

    Args:
        arguments: the command and its options. given: the same as the user gave them, for the record of the run. own_config:
            the configuration of a resumed run, where it is not the user who names it. trusted: the modules of the user's own
            that a network's parts may be of.
    """

    model: TrixTask

    def __init__(
        self, arguments: list[str], given: list[str], own_config: Path | None = None, trusted: Sequence[str] = ()
    ) -> None:
        self._arguments, self._own_config, self._trusted = arguments, own_config, trusted
        self._checkpoint_path: str | None = None
        self._callbacks: list[Callback] = []
        self._record = RunRecord(given)
        super().__init__(
            TrixTask,
            L.LightningDataModule,
            args=arguments,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The task makes its own optimizer. Its hyperparameters are plain values, which need no instantiators.
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False},
            save_config_callback=RunConfigSaver,
            save_config_kwargs={"overwrite": True},
            parser_class=TrixParser,
            parser_kwargs={"prog": "trix", **{command: {"epilog": _epilog(command)} for command in EXAMPLES}},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ReportPage, "report")
        for name in FROM_DATA:
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=self._from_data(name), apply_on="instantiate")

    def _from_data(self, name: str) -> Callable[[Any], Any]:
        """What fills the parameter of the task: the data's attribute, else the parameter's default, else None."""

        def get(data: Any) -> Any:
            if hasattr(data, name):
                return getattr(data, name)
            path = self.config[self.config["subcommand"]]["model"]["class_path"]
            parameter = inspect.signature(named(path)).parameters.get(name)
            return None if parameter is None or parameter.default is parameter.empty else parameter.default

        get.__name__ = name
        return get

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:  # noqa: ARG002
        self.config = parsed_settings(parser, self._arguments, self._own_config, self._trusted)
        settings = self.config[self.config["subcommand"]]
        # Nothing but tensors and plain values is ever loaded.
        settings["weights_only"] = True
        # Kept back until the classes are made: LightningCLI would let the checkpoint override the configuration in silence.
        self._checkpoint_path = settings["ckpt_path"]
        if self._checkpoint_path is not None and self.config["subcommand"] != "fit":
            self._checkpoint_path = str(best_checkpoint(Path(self._checkpoint_path)))
        settings["ckpt_path"] = None

    def before_instantiate_classes(self) -> None:
        if self._checkpoint_path is None and self.subcommand != "fit":
            raise UserError(f"`trix {self.subcommand}` needs a checkpoint: --ckpt_path RUN")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            raise UserError(one_line(reason(str(error)))) from error

    def instantiate_trainer(self, **settings: Any) -> L.Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        callbacks: list[Callback] = config["callbacks"] if isinstance(config["callbacks"], list) else []
        for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches"):
            if config[name] == 0:  # Lightning would divide by it
                raise UserError(f"trainer.{name} (0) must be > 0")
        if isinstance(config["callbacks"], Callback):
            callbacks = [config["callbacks"]]
        if config["fast_dev_run"]:
            # A trial would replace the last checkpoint of a real run.
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
            settings["enable_checkpointing"] = False
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not has_bar and config["enable_progress_bar"] is not False:
            # Without a terminal a bar is noise; RunReport's lines are there in either case.
            if sys.stdout.isatty():
                callbacks.append(StepProgressBar())
            else:
                settings["enable_progress_bar"] = False
        if self.subcommand == "fit":
            added: list[Callback] = [RunReport(), self._record, RandomState(), RunNotebook(), StabilityMonitor()]
            if config["enable_checkpointing"] is not False and not config["fast_dev_run"]:
                added.append(LastCheckpoint())
            configured = {type(callback) for callback in callbacks} - {RunRecord}
            callbacks += [callback for callback in added if type(callback) not in configured]
        else:
            settings["logger"] = False  # what these commands find is printed or written to a file
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter())
        _check_once(callbacks)
        self._callbacks = callbacks
        settings["plugins"] = self._with_checkpoint_io(config["plugins"])
        return super().instantiate_trainer(**settings, callbacks=callbacks)

    def _with_checkpoint_io(self, plugins: Any) -> list[Any]:
        plugins = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
        writers = [plugin for plugin in plugins if isinstance(plugin, CheckpointIO)]
        if writers and self._own_config is not None:
            kind = type(writers[0]).__name__
            raise UserError(f"{self._own_config}: trainer.plugins ({kind}) must hold no CheckpointIO: {GIVE_CONFIG}")
        return plugins if writers else [*plugins, WholeFileCheckpointIO()]

    def _check_places(self) -> None:
        """Raise UserError where a run folder's own configuration sends the run to files that are there."""
        if self._own_config is None:
            return
        for callback in self._callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and not callback._enable_version_counter:
                rule = "enable_version_counter (False) must be True with a dirpath"
                raise UserError(f"{self._own_config}: ModelCheckpoint's {rule}, or it replaces files: {GIVE_CONFIG}")
        folder = local_log_folder(self.trainer)
        if folder is None or folder.resolve() == self._own_config.parent.resolve():
            return
        for name in (CONFIG_NAME, ENVIRONMENT_NAME, METRICS_NAME):
            if (folder / name).exists():
                raise UserError(f"{self._own_config}: log folder ({folder}) must be new, it holds {name}: {GIVE_CONFIG}")

    def after_instantiate_classes(self) -> None:
        # All that can be checked is checked here, before the logger makes its folder.
        for callback in self._callbacks:
            check = getattr(callback, "check_network", None)
            if check is not None:
                check(self.model)
        self._check_places()
        self.model.check_data(self.datamodule)
        if self.subcommand == "fit":
            check_hyperparameters(self.model)
            check_hyperparameters(self.datamodule)
            optimizer, _ = self.model.make_optimizer(self.trainer.max_steps)
            check_eps(optimizer, self.trainer.precision)
        if self._checkpoint_path is not None:
            try:
                if Path(self._checkpoint_path).is_dir():  # of fit alone
                    raise UserError(f"--ckpt_path {self._checkpoint_path} must be a file; --resume goes on from a run folder")
                checkpoint = read_checkpoint(self._checkpoint_path)
                self.model.check_checkpoint(checkpoint)
                if self.subcommand == "fit":
                    check_resumable(checkpoint)
                    if isinstance(self.datamodule, TrixDataModule):
                        self.datamodule.check_resumed(checkpoint)
                    self._record.go_on_from(Path(self._checkpoint_path), log_folder(Path(self._checkpoint_path), checkpoint))
                for key in reversed(COPIES):  # all are checked, the first is the one to stay
                    if key in checkpoint:
                        load_weights(self.model, checkpoint[key])
            except UserError as error:
                text = str(error)
                raise UserError(text if self._checkpoint_path in text else f"{self._checkpoint_path}: {text}") from error
            self.config_init[self.subcommand]["ckpt_path"] = self._checkpoint_path


def parsed_settings(
    parser: ArgumentParser, arguments: list[str], own_config: Path | None = None, trusted: Sequence[str] = ()
) -> Namespace:
    """The checked settings of the command in ``arguments``; the other parameters are those of :class:`TrixCLI`.

    Raises:
        UserError: a key or a value is wrong.
    """
    try:
        config = parser.parse_args(arguments)
    except (ParserError, UnicodeDecodeError) as error:
        files = config_files(arguments)
        denied = denied_import(str(error), own_config)
        if denied is not None:
            raise UserError(denied) from error
        message = str(error).replace('"<unicode string>"', _broken_file(files))
        if isinstance(error, UnicodeDecodeError) or message.startswith("Unexpected config"):
            raise UserError(f"{_broken_file(files)} must be YAML with keys and values") from error
        options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        raise UserError(shorten_parser_error(message, known_keys(), class_names(), files, options)) from error
    except RecursionError as error:
        raise UserError("a value of the configuration must not hold itself, or be nested too deeply") from error
    settings = config[config["subcommand"]]
    for name in FROM_DATA:
        if settings.get(f"model.init_args.{name}") is not None:
            raise UserError(f"model.{name} comes from the data and cannot be set")
    if isinstance(settings.get("model.init_args.network"), list):  # the parser takes it, and the default in its place
        raise UserError(f"model.network ({settings['model.init_args.network']}) must be keys and values")
    check_classes(settings.as_dict())
    import_parts(settings.as_dict().get("model"), own_config or "the configuration", trusted)
    for name, value in dict(settings.as_dict()["model"].get("init_args", {})).items():
        if inspect.isfunction(value) and value.__name__ == "<lambda>":
            rule = "must be a class, or like `lambda p: AdamW(p, lr=0.1)`"
            raise UserError(f"default of model.{name} {rule}: config.yaml cannot say it otherwise")
    return config


def fit_settings(path: Path | str) -> dict[str, Any]:
    """What ``trix fit --config PATH`` would run with: all keys, with the defaults of those that the file leaves out.

    Raises:
        UserError: the file cannot be read, or a key or a value is wrong.
    """
    arguments = ["fit", "--config", str(path)]
    trusted = named_on_command_line(arguments, [read_yaml(path)])
    with only_trusted_imports(trusted):
        parser = capture_parser(lambda: TrixCLI(["fit"], given=[]))
        return parsed_settings(parser, arguments, trusted=trusted)["fit"].as_dict()


def _check_once(callbacks: Sequence[Callback]) -> None:
    """Raise UserError where a checkpoint could not tell the states of two callbacks apart."""
    counts = Counter(callback.state_key for callback in callbacks if type(callback).state_dict is not Callback.state_dict)
    for key, count in counts.items():
        if count > 1:
            own = " (`trix` adds one itself)" if key == RunRecord.__qualname__ else ""
            raise UserError(f"trainer.callbacks: number of {key} ({count}) must be 1{own}: a checkpoint keeps the state of one")


def _epilog(command: str) -> str:
    examples = "examples:\n" + "\n".join(f"  trix {example}" for example in EXAMPLES[command])
    return f"{RESUME_HELP}\n\n{TRUST_HELP}\n\n{examples}" if command == "fit" else examples


def config_files(arguments: list[str]) -> list[Path]:
    """The files that --config names, the last (which overrides the others) first."""
    files = []
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ("--config", "-c"):
            files.append(Path(value or "".join(arguments[place + 1 : place + 2])))
    return files[::-1]


def _broken_file(files: list[Path]) -> str:
    """The first file that is not YAML with keys and values, which the parser reads as a nameless text."""
    for path in files:
        if not isinstance(read_yaml(path), dict):
            return str(path)
    return "the configuration"
