"""The table of commands: what help, dispatch and completion read, and that the README says the same."""

import importlib
import re
from pathlib import Path

from lightning_modules.commands.table import COMMANDS, help_text

NAMES = {command.name for command in COMMANDS}


def test_a_command_has_one_name_and_one_module() -> None:
    assert len(NAMES) == len(COMMANDS)
    for command in COMMANDS:
        module = importlib.import_module(command.module)
        if not command.is_training:
            assert module.make_parser().prog == f"trix {command.name}"
            assert callable(getattr(module, f"run_{command.name}"))


def test_the_help_lists_each_command_once_and_names_no_other() -> None:
    text = help_text()
    listed = re.findall(r"^  (\w+) +\S", text.split("options\n")[0], re.MULTILINE)
    assert listed == [command.name for command in COMMANDS]
    assert set(re.findall(r"^  trix (\w+)", text, re.MULTILINE)) <= NAMES


def test_the_readme_shows_every_command_and_no_other() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    shown = {
        name
        for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
        for name in re.findall(r"^trix (\w+)", block, re.M)
    }
    assert shown <= NAMES
    assert set(re.findall(r"`?trix (\w+)", readme)) >= NAMES - {"validate", "test", "predict"}
