import io

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from small_runs import MakeTrainer, read_events

from lightning_modules.callbacks import ClaimMonitor
from lightning_modules.callbacks.claims import claim_table
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask


def test_claims_are_those_of_the_validation(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer
) -> None:
    metrics = make_trainer(callbacks=[ClaimMonitor()]).validate(classifier, digits, verbose=False)[0]
    images, labels = digits.val_dataloader().dataset.tensors
    with torch.no_grad():
        infos = classifier.eval().network(images, return_routing=True)[1]
    for name, info in zip(routed_layers(classifier), infos, strict=True):
        count_EC = torch.zeros(4, 10)
        for tiles, label in zip(info["tile_idx"].flatten(1), labels, strict=True):
            for tile in tiles:
                count_EC[tile, label] += 1
        rate = (count_EC / count_EC.sum(dim=0)).amax(dim=0).mean()
        used = count_EC[count_EC.sum(dim=1) > 0]
        purity = (used.amax(dim=1) / used.sum(dim=1)).mean()
        assert metrics[f"claims/{name}/mean_claim_rate"] == pytest.approx(rate.item())
        assert metrics[f"claims/{name}/mean_purity"] == pytest.approx(purity.item())


def test_few_classes_get_a_figure_and_a_table(
    classifier: ClassifierTask,
    digits: DigitsDataModule,
    make_trainer: MakeTrainer,
    tensorboard: TensorBoardLogger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(logger=tensorboard, callbacks=[ClaimMonitor()])
    trainer.fit(classifier, digits)
    assert "claims/class_by_tile" in read_events(tensorboard).Tags()["images"]
    fitted = capsys.readouterr().out
    assert fitted.count("Which class goes to which tile") == 1
    trainer.validate(classifier, digits, verbose=False)
    assert capsys.readouterr().out.count("Which class goes to which tile") == 1


def test_many_classes_get_metrics_alone(
    language_model: LanguageModelTask,
    text: TextDataModule,
    make_trainer: MakeTrainer,
    tensorboard: TensorBoardLogger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert text.vocab_size > 32
    make_trainer(logger=tensorboard, callbacks=[ClaimMonitor()]).fit(language_model, text)
    tags = read_events(tensorboard).Tags()
    assert tags["images"] == []
    assert "claims/layer_1/mean_purity" in tags["scalars"]
    assert "Which class" not in capsys.readouterr().out


def test_table_names_the_favourite_tiles_of_each_class_seen() -> None:
    rate_EC = torch.tensor([[0.75, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.0, 0.0]])
    console = Console(file=io.StringIO(), width=100)
    console.print(claim_table({"layer_0": rate_EC}, ["cat", "dog", "owl"]))
    printed = console.file.getvalue()
    assert "tile 0 75%, tile 2 25%" in printed
    assert "tile 1 100%" in printed
    assert "dog" not in printed


def test_arguments_and_task_are_checked(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"max_classes \(-1\) must be >= 0"):
        ClaimMonitor(max_classes=-1)
    with pytest.raises(UserError, match="class_names, which BoringModel lacks"):
        make_trainer(callbacks=[ClaimMonitor()]).fit(BoringModel())
