"""Parts from outside the packages, as a user writes them: texts of modules, and configurations that name their classes."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

PAGE = (Path(__file__).parents[2] / "docs/how-to/own-task.md").read_text()
RECIPE = re.search(r"```python\n(# own_task.py\n.*?)```", PAGE, re.DOTALL)
assert RECIPE is not None
# Whether a module has been run can be seen by a file "imported".
MARK = '\nfrom pathlib import Path\nPath(__file__).with_name("imported").touch()\n'
OWN_TASK = RECIPE[1] + MARK

OWN_DATA = (
    """\
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.data.loader import permuted_loader


class VectorsDataModule(L.LightningDataModule):
    num_features, num_classes, class_names = 3, 2, ("low", "high")

    def __init__(self, num_sequences: int = 60, length: int = 4):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.hparams.num_sequences, self.hparams.length, 3, generator=generator)
        self.label = (self.x.mean(dim=(1, 2)) > 0).long()

    def train_dataloader(self):
        return permuted_loader(self.x[20:], self.label[20:], "sequences", 8, 0, {}, self.trainer)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[:20], self.label[:20]), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


def make(num_sequences, length):
    Path(__file__).with_name("executed").touch()
"""
    + MARK
)

# A TrixTask with steps of its own, which return no routing; its batches have no labels.
OWN_STEPS = (
    """\
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_modules.data import TrixDataModule
from lightning_modules.tasks import OptimizerCallable, TrixTask
from trix.nn import TriXFFN


class AutoencoderTask(TrixTask):
    def __init__(self, width: int, optimizer: OptimizerCallable = lambda p: SGD(p, lr=0.1)):
        super().__init__(nn.Sequential(nn.Linear(5, width), TriXFFN(width, 2), nn.Linear(width, 5)), optimizer, None)
        self.scale = float(torch.ones(3).sum())  # has no value on the device "meta"
        self.save_hyperparameters({"width": width})

    def training_step(self, x):
        return (self(x) - x).square().mean()

    def validation_step(self, x):
        self.log("val/loss", (self(x) - x).square().mean())


class NoiseDataModule(TrixDataModule):
    def setup(self, stage):
        self.x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.x, batch_size=8)

    def val_dataloader(self):
        return [DataLoader(self.x[:10], batch_size=4)]
"""
    + MARK
)
MODULES = {"own_task": OWN_TASK, "own_data": OWN_DATA, "own_steps": OWN_STEPS}
NETWORK = {"d_model": 8, "num_layers": 1, "n_heads": 2, "context_length": 4, "ffn": {"num_tiles": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "moons": {
        "model": {"class_path": "own_task.MoonsTask", "init_args": {"width": 8}},
        "data": {"class_path": "own_task.MoonsDataModule", "init_args": {"num_points": 200}},
    },
    "vectors": {
        "model": {"class_path": "ClassifierTask", "init_args": {"network": NETWORK, "lr_scheduler": None}},
        "data": {"class_path": "own_data.VectorsDataModule", "init_args": {"num_sequences": 64}},
    },
    "steps": {
        "model": {"class_path": "own_steps.AutoencoderTask", "init_args": {"width": 6}},
        "data": {"class_path": "own_steps.NoiseDataModule"},
    },
}


def write_parts(folder: Path) -> None:
    """The modules, and a configuration {moons,vectors,steps}.yaml of each run: 6 steps with two validations."""
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    for name, parts in RUNS.items():
        logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": name}}
        callbacks = [{"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}}]
        trainer = {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
        trainer |= {"log_every_n_steps": 1, "logger": logger, "callbacks": callbacks}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(parts | {"trainer": trainer}))
