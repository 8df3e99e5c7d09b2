"""Language models of checkpoints as backends of trix.superposition."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import torch

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import CheckpointError, ClassifierTask, LanguageModelTask
from lightning_modules.tasks.backend import backend_from_checkpoint
from trix.superposition import DumpConfig
from trix.superposition.data import load_text
from trix.superposition.dump import ActivationDump, dump_layer_activations


def test_a_trained_model_is_dumped_from_its_checkpoint(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    backend = backend_from_checkpoint(tmp_path / "saved.ckpt")
    assert backend.vocabulary == text.vocabulary
    states: list[torch.Tensor] = []
    tokens = backend.tokenize([text.vocabulary[:8]], 8)
    with torch.no_grad():
        language_model.eval().network(tokens["input_ids"], True, hidden_states=states)
    assert torch.equal(backend.forward_hidden(**tokens, layer=1), states[1])

    (tmp_path / "paragraphs.txt").write_text(f"{text.vocabulary[1:5]}\n\n{text.vocabulary[3:9]}\n")
    frame = load_text(tmp_path / "paragraphs.txt")
    dump_layer_activations(frame, "title", "topic", backend, DumpConfig(layer=1, max_len=8), tmp_path / "dump")
    assert ActivationDump(tmp_path / "dump").manifest.identity.model == backend.digest()


def test_a_classifier_is_no_backend(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(limit_val_batches=1)
    trainer.fit(classifier, digits)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match=r"c.ckpt: task \('classifier'\) must be a language model"):
        backend_from_checkpoint(tmp_path / "c.ckpt")
