import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from small_runs import MakeTrainer, read_events

from lightning_modules.callbacks import ClaimMonitor, ClaimWatch
from lightning_modules.callbacks.claims import claim_table
from lightning_modules.callbacks.figures import claim_figure
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig


def test_claims_are_those_of_the_validation(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer
) -> None:
    monitor = ClaimMonitor(watch=[ClaimWatch("3", 0, 2), ClaimWatch(3, 1, 2)])
    metrics = make_trainer(callbacks=[monitor]).validate(classifier, digits, verbose=False)[0]
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
        best_C = (count_EC / count_EC.sum(dim=0)).amax(dim=0)
        assert metrics[f"claims/{name}/mean_claim_rate"] == pytest.approx(rate.item())
        assert metrics[f"claims/{name}/lowest_claim_rate"] == pytest.approx(best_C.min().item())
        assert metrics[f"claims/{name}/highest_claim_rate"] == pytest.approx(best_C.max().item())
        assert metrics[f"claims/{name}/3/tile_2"] == pytest.approx((count_EC[2, 3] / count_EC[:, 3].sum()).item())
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
    assert (Path(tensorboard.log_dir) / "class_by_tile.png").read_bytes().startswith(b"\x89PNG")
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


def test_all_classes_stand_in_a_file_however_many(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    class Counts(L.Callback):
        """Of the last validation: assignments by layer, tile and class."""

        def on_validation_epoch_start(self, *rest: Any) -> None:
            self.count_LEC = torch.zeros(2, 4, text.vocab_size, dtype=torch.int64)

        def on_validation_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, *rest: Any) -> None:
            for layer, info in enumerate(outputs["routing"].values()):
                for tile, label in zip(info["tile_idx"].flatten(), outputs["label"].flatten(), strict=True):
                    self.count_LEC[layer, tile, label] += 1

    counts = Counts()
    trainer = make_trainer(
        max_steps=4, logger=tensorboard, callbacks=[ClaimMonitor(max_classes=0), counts], limit_val_batches=1
    )
    trainer.fit(language_model, text)
    with (Path(tensorboard.log_dir) / "claims.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [(name, f"layer_{layer}") for name in language_model.class_names for layer in range(2)]
    assert [(row["class"], row["layer"]) for row in rows] == names
    for row in rows:
        count_EC = counts.count_LEC[int(row["layer"][-1])]
        count_E = count_EC[:, language_model.class_names.index(row["class"])]
        assert int(row["count"]) == count_E.sum()
        if not count_E.any():
            assert {row["favourite_tile"], row["claim_rate"], row["tile_purity"]} == {""}
            continue
        tile = int(count_E.argmax())
        assert int(row["favourite_tile"]) == tile
        assert float(row["claim_rate"]) == pytest.approx(float(count_E[tile] / count_E.sum()), rel=1e-5)
        assert float(row["tile_purity"]) == pytest.approx(float(count_EC[tile].max() / count_EC[tile].sum()), rel=1e-5)
    assert {int(row["count"]) > 0 for row in rows} == {True, False}


def test_a_run_without_logs_leaves_no_claims(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(callbacks=[ClaimMonitor(max_classes=0)]).fit(classifier, digits)
    assert not list(tmp_path.rglob("claims.csv"))


def test_a_class_never_seen_has_no_claim_rate_to_wait_for(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    """One batch of 8 characters; the classes of a language model go by the characters as well as by their quoted names."""
    seen = {text.vocabulary[label] for label in next(iter(text.val_dataloader()))[1].flatten().tolist()}
    unseen = min(set(text.vocabulary) - seen)
    names = (min(seen), repr(min(seen)))
    watch = [ClaimWatch(unseen, 0, 1), *(ClaimWatch(name, 0, tile) for name in names for tile in range(4))]
    trainer = make_trainer(callbacks=[ClaimMonitor(watch=watch)], limit_val_batches=1)
    metrics = trainer.validate(language_model, text, verbose=False)[0]
    assert math.isnan(metrics[f"claims/layer_0/{unseen}/tile_1"])
    for name in names:
        assert sum(metrics[f"claims/layer_0/{name}/tile_{tile}"] for tile in range(4)) == pytest.approx(1.0)


def test_padding_makes_no_claims(make_trainer: MakeTrainer) -> None:
    """The tokens of two batches of texts without their padding, counted by hand."""
    data = LanguageIdDataModule(batch_size=16, context_length=24)
    network = ClassifierConfig(16, 2, 2, context_length=24, ffn=FFNConfig(num_tiles=4, top_k=1))
    task = ClassifierTask(None, data.num_classes, data.class_names, network, vocabulary=data.vocabulary)
    trainer = make_trainer(callbacks=[ClaimMonitor()], limit_val_batches=2)
    metrics = trainer.validate(task, data, verbose=False)[0]
    tokens, labels = (tensor[:32] for tensor in data.val_dataloader().dataset.tensors)
    with torch.no_grad():
        logits, infos, _ = task.eval().network(tokens, return_routing=True)
    count_EC = torch.zeros(4, data.num_classes)
    for tiles, label, text in zip(infos[1]["tile_idx"], labels, tokens, strict=True):
        for tile in tiles[text != 0]:
            count_EC[tile, label] += 1
    assert 0 < int((tokens == 0).sum()) == 32 * 24 - count_EC.sum()
    is_seen_C = count_EC.sum(dim=0) > 0
    rate = (count_EC / count_EC.sum(dim=0))[:, is_seen_C].amax(dim=0).mean()
    assert metrics["claims/layer_1/mean_claim_rate"] == pytest.approx(rate.item())
    assert metrics["val/accuracy"] == pytest.approx((logits.argmax(dim=-1) == labels).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_many_classes_are_ordered_by_likeness_the_same_in_all_layers() -> None:
    """Classes of two kinds, mixed: the figure has each kind in one piece, and a class never seen at the end."""
    num_classes = 41
    rate_EC = torch.zeros(6, num_classes)
    rate_EC[0, 0:40:2], rate_EC[1, 0:40:2] = 0.7, 0.3
    rate_EC[4, 1:40:2], rate_EC[5, 1:40:2] = 0.6, 0.4
    names = [f"class {index}" for index in range(num_classes)]
    figure = claim_figure({"layer_0": rate_EC, "layer_1": rate_EC.flip(0)}, names)
    axes = [axis for axis in figure.axes if axis.get_title().startswith("layer")]
    shown = [label.get_text() for label in axes[0].get_yticklabels()]
    assert sorted(shown) == sorted(names)
    assert shown[-1] == "class 40"
    parity = [int(name.split()[1]) % 2 for name in shown[:-1]]
    assert parity in ([0] * 20 + [1] * 20, [1] * 20 + [0] * 20)
    classes = [int(name.split()[1]) for name in shown]
    for axis, layer_EC in zip(axes, (rate_EC, rate_EC.flip(0)), strict=True):
        tiles = [int(label.get_text()) for label in axis.get_xticklabels()]
        assert sorted(tiles) == list(range(6))
        assert torch.equal(torch.from_numpy(axis.images[0].get_array().data), layer_EC[tiles][:, classes].T)


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
    with pytest.raises(ValueError, match=r"layer \(0\) and tile \(-1\) must be >= 0"):
        ClaimWatch("7", 0, -1)
    with pytest.raises(UserError, match="class_names, which BoringModel lacks"):
        make_trainer(callbacks=[ClaimMonitor()]).fit(BoringModel())


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (ClaimWatch(10, 0, 0), r"class_name \(10\) must be one of the 10 class_names of the task; did you mean"),
        (ClaimWatch(1, 2, 0), r"watch: layer \(2\) must be < number of routed layers \(2\)"),
        (ClaimWatch(1, 1, 4), r"watch: tile \(4\) must be < num_tiles \(4\) of layer 1"),
    ],
)
def test_what_is_watched_must_be_there(watch: ClaimWatch, message: str, classifier: ClassifierTask) -> None:
    with pytest.raises(UserError, match=message):
        ClaimMonitor(watch=[watch]).check_network(classifier)
