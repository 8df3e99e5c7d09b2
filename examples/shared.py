"""What the examples share: the folder they write to, the model they explain, and labelled texts that come with Python."""

import argparse
import inspect
from importlib import import_module
from pathlib import Path

import pandas as pd

from lightning_modules.run_folder import best_checkpoint
from lightning_modules.tasks.backend import backend_from_checkpoint
from trix.superposition.backends import TriXBackend

LAYER = 2
MODULES = {
    "files": ("glob", "os", "pathlib", "shutil", "tarfile", "tempfile", "zipfile"),
    "numbers": ("cmath", "decimal", "fractions", "math", "random", "statistics"),
}


class Folder:
    """Where an example finds what the ones before it wrote, and writes its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.titles, self.shards, self.sae = root / "titles.csv", root / "acts_shards", root / "sae"
        self.summary, self.merged = root / "latent_summary.csv", root / "merged.safetensors"


def arguments(description: str | None) -> tuple[Folder, Path]:
    """The folder and the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=Path("runs/examples"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=Path("runs/char_lm"), help="a language model (default: %(default)s)")
    given = parser.parse_args()
    if not given.model.exists():
        parser.error(f"{given.model} is missing: `make demo` trains one")
    return Folder(given.folder), best_checkpoint(given.model)


def open_backend(checkpoint: Path) -> TriXBackend:
    return backend_from_checkpoint(checkpoint)


def documented(vocabulary: str) -> pd.DataFrame:
    """Lines of the documentation of Python's own modules, with the topic of the module."""
    rows = []
    for topic, names in MODULES.items():
        for name in names:
            module = import_module(name)
            for _, value in sorted(vars(module).items(), key=lambda item: item[0]):
                if (inspect.isroutine(value) or inspect.isclass(value)) and value.__doc__:
                    lines = [line.strip() for line in value.__doc__.splitlines()]
                    rows += [(line, topic) for line in lines if len(line) >= 20 and set(line) <= set(vocabulary)]
    return pd.DataFrame(rows, columns=["title", "topic"]).drop_duplicates("title")
