"""``trix completion``: the script is one that the shell takes, and completes what there is."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.commands.table import COMMANDS

COMPLETE = """\
source "$1"; shift
COMP_WORDS=(trix "$@"); COMP_CWORD=$#
_shtab_trix trix "${COMP_WORDS[COMP_CWORD]}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "trix.bash"
    code = "import sys; from lightning_modules.cli import main; sys.exit(main(['completion', 'bash']))"
    path.write_text(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    return path


def completed(script: Path, *words: str) -> set[str]:
    command = ["bash", "-c", COMPLETE, "bash", str(script), *words]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


def test_commands_options_choices_and_files_are_completed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert completed(script, "") == {command.name for command in COMMANDS}
    assert completed(script, "surgery", "--si") == {"--signature"}
    assert completed(script, "surgery", "trix.bash", "") == {"insert", "freeze", "unfreeze", "remove"}
    assert completed(script, "inspect", "tr") == {"trix.bash"}
    assert completed(script, "fit", "--trainer.max_s") == {"--trainer.max_steps"}
    assert completed(script, "fit", "--resu") == {"--resume"}
    for command in ("fit", "validate", "test", "predict", "inspect", "why", "surgery", "export"):
        assert completed(script, command, "--tru") == {"--trust"}
    assert completed(script, "validate", "--ckpt_path", "tr") == {"trix.bash"}
