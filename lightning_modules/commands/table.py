"""The commands of ``trix``, one row each: help, dispatch, completion and the check of README and docs read this table."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

TRAINING_MODULE = "lightning_modules.lightning_cli"


class Command(NamedTuple):
    """group: the heading under which the help lists it. summary: what it does, in a line.

    module: where it is. A light command's module has ``make_parser()`` and ``run_NAME(arguments) -> exit code``.
    """

    name: str
    group: str
    summary: str
    module: str

    @property
    def is_training(self) -> bool:
        """Whether it is one of Lightning's, which share one parser."""
        return self.module == TRAINING_MODULE

    def run(self, arguments: list[str]) -> int:
        """Import the command and run it; arguments: those after its name."""
        if self.is_training:
            run_training: Callable[[list[str]], int] = import_module(self.module).run_training_command
            return run_training([self.name, *arguments])
        run: Callable[[list[str]], int] = getattr(import_module(self.module), f"run_{self.name}")
        return run(arguments)


def _training(name: str, summary: str) -> Command:
    return Command(name, "training (trix COMMAND --help lists every option)", summary, TRAINING_MODULE)


def _light(group: str, name: str, summary: str) -> Command:
    return Command(name, group, summary, f"lightning_modules.commands.{name}")


READING = "reading (CKPT: a checkpoint, or a run folder, which means its newest best.ckpt)"
EDITING, DEPLOYMENT = "editing", "deployment"
COMMANDS = (
    _training("fit", "train a model, as one or several YAML files say"),
    _training("validate", "measure a checkpoint on the validation data"),
    _training("test", "measure a checkpoint on the test data (the validation data, where a data set has no other)"),
    _training("predict", "write the predictions of a checkpoint to a file"),
    _light(READING, "inspect", "write one HTML page: what each tile of a checkpoint, or of an exported model, responds to"),
    _light(READING, "why", "print why each token went to its tile: winner, runner-up and what decided"),
    _light(READING, "dump", "write the activations of a model to disk, for sparse autoencoders to learn from"),
    _light(READING, "sae", "judge and read sparse autoencoders: do they beat their controls, what does each latent stand for"),
    _light(READING, "runs", "list the runs below a folder: when, how long, losses, checkpoints"),
    _light(
        EDITING,
        "surgery",
        "insert, freeze, unfreeze a signature or remove a tile of a checkpoint or exported model, into a new file",
    ),
    _light(EDITING, "upcycle", "cut the feed-forward layers of a trained language model into routed tiles, into a new file"),
    Command(
        "import",
        DEPLOYMENT,
        "write a ternary model of others as a folder for onnxruntime-genai (needs no torch)",
        "lightning_modules.commands.import_decoder",
    ),
    _light(DEPLOYMENT, "export", "write a checkpoint as one ONNX file with packed ternary weights"),
    _light(DEPLOYMENT, "generate", "continue a text with an exported model (needs no torch)"),
    _light(DEPLOYMENT, "bench", "measure how fast an exported model runs here, or run a benchmark of the source tree"),
    _light(DEPLOYMENT, "doctor", "check the installation: versions, kernels, what is missing"),
    _light(DEPLOYMENT, "completion", "print a script that completes all this in bash, zsh or tcsh"),
)
EXAMPLES = """\
examples
  trix fit --config configs/char_lm.yaml
  trix fit --config configs/char_lm.yaml --trainer.max_steps 100 --print_config
  trix fit --resume runs/char_lm
  trix validate --config configs/char_lm.yaml --ckpt_path runs/char_lm/version_0/checkpoints/best.ckpt
  trix inspect runs/char_lm
  trix why runs/char_lm --prompt "The "
  trix dump runs/char_lm --site resid_pre.2 --output runs/char_lm/acts
  trix sae eval runs/sae --model runs/char_lm
  trix sae dashboard runs/sae --model runs/char_lm
  trix runs --sort val/loss
  trix surgery runs/char_lm insert --ngrams "th,Th" --layer 1 --tile 3 --output edited.ckpt
  trix upcycle runs/dense --tiles 16 --top-k 4 --output tiles.ckpt
  trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx
  trix generate runs/char_lm/model.onnx --prompt "The "
  trix import bitnet-b1.58-2B-4T --output bitnet
  trix bench runs/char_lm/model.onnx
  trix completion bash > ~/.local/share/bash-completion/completions/trix
  trix doctor
"""


def help_text() -> str:
    """What ``trix --help`` prints."""
    lines = [
        "usage: trix COMMAND [OPTIONS]",
        "",
        "Sparse networks you can read: train them, read them, export them, run them.",
        "",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += [group, *(f"  {command.name:<11} {command.summary}" for command in COMMANDS if command.group == group)]
    lines += ["", "options", "  -h, --help  show this help", "  --version   show the version", "", EXAMPLES]
    return "\n".join(lines)
