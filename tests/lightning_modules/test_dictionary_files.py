"""ae.pt of dictionary_learning: read as plain data, and nothing else is."""

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_modules.dictionary_files import load_dictionary_learning
from lightning_modules.errors import UserError
from trix.superposition.sae import TopKSAE


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {
        "k": torch.tensor(2, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
        "decoder.weight": torch.randn(4, 8),
        "encoder.weight": torch.randn(8, 4),
        "encoder.bias": torch.zeros(8),
        "b_dec": torch.zeros(4),
    }
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
    return tmp_path


def test_an_autoencoder_is_read(folder: Path) -> None:
    sae = load_dictionary_learning(folder)
    assert isinstance(sae, TopKSAE)
    assert (sae.d_model, sae.k, sae.active) == (4, 8, 2)


def test_what_is_no_autoencoder_is_refused(folder: Path) -> None:
    torch.save({"k": Harmful()}, folder / "ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt is not a checkpoint that can be loaded safely"):
        load_dictionary_learning(folder)
    torch.save([1], folder / "ae.pt")
    with pytest.raises(UserError, match=r"\(dict and list\) must hold keys and values"):
        load_dictionary_learning(folder)
    torch.save({}, folder / "ae.pt")
    with pytest.raises(UserError, match=r"weight encoder.weight \(NoneType\)"):
        load_dictionary_learning(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="must be JSON"):
        load_dictionary_learning(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
        load_dictionary_learning(folder)
