"""The ``trix`` command. Light: help and the deployment commands never import torch."""

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lightning_modules.error_text import did_you_mean, one_line
from lightning_modules.errors import UserError

HELP = """\
usage: trix COMMAND [OPTIONS]

Sparse networks you can read: train them, read them, export them, run them.

training (trix COMMAND --help lists every option)
  fit         train a model, as one or several YAML files say
  validate    measure a checkpoint on the validation data
  test        measure a checkpoint on the test data (the validation data, where a data set has no other)
  predict     write the predictions of a checkpoint to a file
reading (CKPT: a checkpoint, or a run folder, which means its newest best.ckpt)
  inspect     write one HTML page: what each tile of a checkpoint, or of an exported model, responds to
  why         print why each token went to its tile: winner, runner-up and what decided
  runs        list the runs below a folder: when, how long, losses, checkpoints
editing
  surgery     insert, freeze, unfreeze a signature or remove a tile of a checkpoint or exported model, into a new file
deployment
  export      write a checkpoint as one ONNX file with packed ternary weights
  generate    continue a text with an exported model (needs no torch)
  bench       measure how fast an exported model runs here, or run a benchmark of the source tree
  doctor      check the installation: versions, kernels, what is missing
  completion  print a script that completes all this in bash, zsh or tcsh

options
  -h, --help  show this help
  --version   show the version

examples
  trix fit --config configs/char_lm.yaml
  trix fit --config configs/char_lm.yaml --trainer.max_steps 100 --print_config
  trix fit --resume runs/char_lm
  trix validate --config configs/char_lm.yaml --ckpt_path runs/char_lm/version_0/checkpoints/best.ckpt
  trix inspect runs/char_lm
  trix why runs/char_lm --prompt "The "
  trix runs --sort val/loss
  trix surgery runs/char_lm freeze --layer 1 --tile 3 --tag keep --output frozen.ckpt
  trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx
  trix generate runs/char_lm/model.onnx --prompt "The "
  trix bench runs/char_lm/model.onnx
  trix completion bash > ~/.local/share/bash-completion/completions/trix
  trix doctor
"""
TRAINING_COMMANDS = ("fit", "validate", "test", "predict")
OTHER_COMMANDS = ("inspect", "why", "runs", "surgery", "export", "generate", "bench", "doctor", "completion")
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
TRACEBACK_VARIABLE = "TRIX_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    What a user can mend is told in one line on stderr, with exit code 2; TRIX_TRACEBACK=1 shows where it came from. An error
    of the program itself keeps its traceback. Ctrl-C gives 130.
    """
    # A closed stdout or stderr is None in Python: what would have gone there is dropped.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (open until the end)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 (open until the end)
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"trix: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except MemoryError:
        print("trix: error: out of memory", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit of its own.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the program itself
            return _output_failed(stop.__context__)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # The reader of the output has gone, as in `trix generate ... | head`: nothing more can be written, also not at exit.
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is not None:  # not what writing to stdout gives
            raise
        return _output_failed(error)


def _output_failed(error: OSError) -> int:
    _drop_output()
    print(f"trix: error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
    return EXIT_USER_ERROR


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> int:
    print("trix: interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def version() -> str:
    try:
        return metadata.version("trix")
    except metadata.PackageNotFoundError:
        return "not installed"


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"trix {version()}")
        return 0
    # Before torch is loaded: threads that spin while they wait slow each other down many times over on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if command in TRAINING_COMMANDS:
        from lightning_modules.lightning_cli import run_training_command

        return run_training_command(arguments)
    if command in OTHER_COMMANDS:
        return _run_light(command, arguments[1:])
    if command.startswith("-"):
        raise UserError(f"the command must come first, got {command}; see `trix --help`")
    hint = did_you_mean(command, (*TRAINING_COMMANDS, *OTHER_COMMANDS)) or "; see `trix --help`"
    raise UserError(f"unknown command {command!r}{hint}")


def _run_light(command: str, arguments: list[str]) -> int:
    """Each command is imported when it is asked for, and imports what is heavy when it has read its options."""
    if command == "inspect":
        from lightning_modules.commands.inspect import run_inspect

        return run_inspect(arguments)
    if command == "why":
        from lightning_modules.commands.why import run_why

        return run_why(arguments)
    if command == "runs":
        from lightning_modules.commands.runs import run_runs

        return run_runs(arguments)
    if command == "surgery":
        from lightning_modules.commands.surgery import run_surgery

        return run_surgery(arguments)
    if command == "doctor":
        from lightning_modules.commands.doctor import run_doctor

        return run_doctor(arguments)
    if command == "bench":
        from lightning_modules.commands.bench import run_bench

        return run_bench(arguments)
    if command == "completion":
        from lightning_modules.commands.completion import run_completion

        return run_completion(arguments)
    if command == "export":
        from lightning_modules.commands.export import run_export

        return run_export(arguments)
    from lightning_modules.commands.generate import run_generate

    return run_generate(arguments)


if __name__ == "__main__":
    sys.exit(main())
