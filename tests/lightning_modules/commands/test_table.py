"""The table of commands: what help, dispatch and completion read, and that README and docs say the same."""

import importlib
import re
from pathlib import Path

from lightning_modules.commands import surgery
from lightning_modules.commands.table import COMMANDS, help_text
from lightning_modules.lightning_cli import fit_settings
from trix.nn import FFNConfig, RoutedLayer

ROOT = Path(__file__).parents[3]
PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
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


def test_tiles_that_examples_freeze_or_remove_are_not_frozen_in_the_run_that_they_name() -> None:
    texts = (PAGES, help_text(), surgery.make_parser().format_help())
    found = [re.findall(r"^ *trix surgery runs/(\w+)\S* (?:freeze|remove) ", text, re.MULTILINE) for text in texts]
    for name in {name for of_text in found for name in of_text}:
        network = fit_settings(ROOT / "configs" / f"{name}.yaml")["model"]["init_args"]["network"]
        layer = FFNConfig(**network["ffn"]).build(16)
        assert isinstance(layer, RoutedLayer)
        assert not layer.router.frozen_tiles().any()
    assert found[0]
    assert found[2]


def test_the_pages_show_every_command_and_no_other() -> None:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", PAGES, re.DOTALL)
    assert {name for block in blocks for name in re.findall(r"^trix (\w+)", block, re.M)} <= NAMES
    assert set(re.findall(r"`?trix (\w+)", PAGES)) >= NAMES - {"validate", "test", "predict"}
