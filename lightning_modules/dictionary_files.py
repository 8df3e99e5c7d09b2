"""Autoencoders in the files of dictionary_learning: ae.pt is a pickle, which is read as plain data or not at all."""

from collections.abc import Mapping
from pathlib import Path

from lightning_modules.errors import UserError
from lightning_modules.tasks.checkpoint_file import load_plain
from trix.superposition.sae import SAE
from trix.superposition.sae.exchange import from_dictionary_learning
from trix.superposition.sae.load import read_json

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"


def load_dictionary_learning(folder: Path | str) -> SAE:
    """Read ae.pt and config.json of dictionary_learning 0.1, for evaluation.

    Raises:
        UserError: no such files, an ae.pt that holds anything but tensors and plain values, a class or weights that
            :func:`trix.superposition.sae.exchange.from_dictionary_learning` does not take.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
    except ValueError as error:
        raise UserError(str(error)) from error
    tensors = load_plain(folder / WEIGHTS_FILE)
    if not isinstance(config, Mapping) or not isinstance(tensors, Mapping):
        kinds = f"{type(config).__name__} and {type(tensors).__name__}"
        raise UserError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} ({kinds}) must hold keys and values")
    try:
        return from_dictionary_learning(tensors, config)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
