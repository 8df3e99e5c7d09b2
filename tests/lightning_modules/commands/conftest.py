"""Checkpoints of small models, as `trix fit` writes them."""

from pathlib import Path

import lightning as L
import pytest
import torch
from small_runs import SENTENCE, save_checkpoint, small_network
from torch.utils.data import TensorDataset

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig


@pytest.fixture(scope="package")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with {lm,dense,hash,digits,texts}.ckpt, and what is none: {foreign,cut,text}.ckpt, empty."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    for name, ffn in (("lm", FFNConfig(num_tiles=4)), ("dense", FFNConfig("dense")), ("hash", FFNConfig(routing="hash"))):
        L.seed_everything(0)
        save_checkpoint(LanguageModelTask(text.vocabulary, small_network(ffn=ffn)), text, folder / f"{name}.ckpt")
    digits = DigitsDataModule()
    network = ClassifierConfig(16, 1, 2, context_length=8, ffn=FFNConfig(num_tiles=4))
    save_checkpoint(ClassifierTask(8, digits.num_classes, digits.class_names, network), digits, folder / "digits.ckpt")
    texts = ClassifierTask(None, 2, ("de", "fr"), network, vocabulary="\0\N{REPLACEMENT CHARACTER} abcé")
    batches = TensorDataset(torch.ones(4, 8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    save_checkpoint(texts, L.LightningDataModule.from_datasets(batches, batches), folder / "texts.ckpt")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "lm.ckpt").read_bytes()[:5000])
    (folder / "text.ckpt").write_text("not a checkpoint")
    (folder / "empty").mkdir()
    return folder


NO_CHECKPOINTS = [
    ("missing.ckpt", "missing.ckpt cannot be read: No such file"),
    ("empty", "empty: the folder holds no checkpoint (*.ckpt)"),
    ("foreign.ckpt", "foreign.ckpt was not written by `trix fit`"),
    ("cut.ckpt", "cut.ckpt is not a checkpoint that can be loaded safely (or it is cut short)"),
    ("text.ckpt", "text.ckpt is not a checkpoint that can be loaded safely (or it is cut short)"),
    ("dense.ckpt", "dense.ckpt: number of routed layers in the model (0) must be >= 1"),
]


@pytest.fixture(params=NO_CHECKPOINTS, ids=[name for name, _ in NO_CHECKPOINTS])
def no_checkpoint(request: pytest.FixtureRequest, checkpoints: Path) -> tuple[str, str]:
    """The path of a file that cannot be read by layers and tiles, and what is said of it."""
    name, message = request.param
    return str(checkpoints / name), message
