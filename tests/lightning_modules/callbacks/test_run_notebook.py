"""What a run leaves for TensorBoard as a whole is read back from its files."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_modules.callbacks import ClaimMonitor, DiversityMonitor, RoutingMonitor, RunNotebook
from lightning_modules.callbacks.run_notebook import history_table, scalar_layout, tile_rows
from lightning_modules.cli import main
from lightning_modules.commands.runs import find_runs
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import FFNConfig


class Surgeon(L.Callback):
    """Freezes a tile after a number of batches, as anybody may."""

    def __init__(self, at_batch: int) -> None:
        self.at_batch = at_batch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at_batch:
            routed_layers(pl_module)["layer_1"].freeze_signature(2, tag="keep|it")


class Failure(L.Callback):
    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at_step:
            raise RuntimeError("planted")


def written_layout(events: EventAccumulator) -> dict[str, Any]:
    """{title: patterns, or (value, lower, upper)} of the last layout."""
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["TriX"]
    charts: dict[str, Any] = {}
    for chart in layout.category[0].chart:
        series = [(part.value, part.lower, part.upper) for part in chart.margin.series]
        charts[chart.title] = series[0] if series else list(chart.multiline.tag)
    return charts


def written_hyperparameters(events: EventAccumulator) -> tuple[dict[str, Any], set[str]]:
    """Those of the run, and the names of the metrics beside them."""
    content = {tag: HParamsPluginData.FromString(part) for tag, part in events.PluginTagToContent("hparams").items()}
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    metrics = {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos}
    return {name: value.number_value or value.string_value for name, value in start.items()}, metrics


def history_texts(events: EventAccumulator) -> list[tuple[int, str]]:
    tag = "surgery/history/text_summary"
    if tag not in events.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def test_a_run_reads_like_a_notebook(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    callbacks = [DiversityMonitor(every_n_steps=2), RoutingMonitor(), ClaimMonitor(), Surgeon(3), RunNotebook()]
    make_trainer(logger=tensorboard, callbacks=callbacks, max_steps=4, log_every_n_steps=1).fit(classifier, digits)
    events, folder = read_events(tensorboard), Path(tensorboard.log_dir)
    charts = written_layout(events)
    assert charts["loss"] == ["^train/loss$", "^val/loss$"]
    assert charts["usage of the tiles, layer_1"] == [r"^tile_usage/layer_1/tile_\d+$"]
    assert {"diversity of the signatures", "churn", "usage of the tiles, layer_0"} <= set(charts)
    assert [step for step, _ in history_texts(events)] == [3]
    assert r"| 3 | layer_1 | 2 | freeze | keep\|it |" in history_texts(events)[0][1]
    values, metrics = written_hyperparameters(events)
    assert values["network/ffn/num_tiles"] == 4
    assert values["optimizer/lr"] == 2e-3  # not what the schedule made of it
    assert (values["data/class"], values["data/batch_size"], values["max_steps"]) == ("DigitsDataModule", 128, 4)
    assert {"summary/last_loss", "summary/best_accuracy"} <= metrics
    assert events.Scalars("summary/last_loss")[0].value == events.Scalars("val/loss")[-1].value
    assert events.Scalars("summary/best_loss")[0].value == min(event.value for event in events.Scalars("val/loss"))
    assert len(find_runs(folder.parent)) == 1  # nothing of it counts as a run of its own
    assert 'tensor_path: "00004/signatures/tensors.tsv"' in (folder / "projector_config.pbtxt").read_text()


def test_signatures_stand_beside_the_classes_that_came_to_their_tiles(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    make_trainer(logger=tensorboard, callbacks=[RunNotebook(), Surgeon(1)]).fit(classifier, digits)
    folder = Path(tensorboard.log_dir) / "00002" / "signatures"
    points = [[float(cell) for cell in line.split("\t")] for line in (folder / "tensors.tsv").read_text().splitlines()]
    layers = routed_layers(classifier)
    assert torch.equal(torch.tensor(points), torch.cat([layer.get_tile_signatures() for layer in layers.values()]))
    header, *rows = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert header == ["tile", "layer", "dominant_class", "purity", "usage", "frozen", "tag"]
    images, labels = digits.val_dataloader().dataset.tensors
    with torch.no_grad():
        infos = classifier.eval().network(images, return_routing=True)[1]
    expected = []
    for name, info in zip(layers, infos, strict=True):
        for tile in range(4):
            came = labels.unsqueeze(-1).expand(info["tile_idx"].shape[:2])[(info["tile_idx"] == tile).any(dim=-1)]
            count = came.bincount(minlength=10)
            usage = f"{len(came) / info['tile_idx'].numel():.4f}"
            is_frozen = (name, tile) == ("layer_1", 2)
            marks = ["frozen", "keep|it"] if is_frozen else ["free to learn", "-"]
            purity = f"{float(count.max() / max(len(came), 1)):.3f}"
            dominant = f"class {int(count.argmax())}" if len(came) else "-"
            expected.append([f"{name} tile {tile}", name, dominant, purity, usage, *marks])
    assert rows == expected


def test_assignments_of_weight_zero_do_not_count(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    notebook = RunNotebook()
    ffn = FFNConfig(num_tiles=4, top_k=1, max_k=3, confidence_threshold=0.0)  # a gap of 0 or more: always one tile
    task = LanguageModelTask(text.vocabulary, small_network(ffn=ffn))
    make_trainer(logger=tensorboard, callbacks=[notebook]).fit(task, text)
    usage = [
        line.split("\t")[4] for line in (Path(tensorboard.log_dir) / "00002/signatures/metadata.tsv").read_text().splitlines()
    ]
    assert sum(map(float, usage[1:5])) == pytest.approx(1.0, abs=1e-3)
    assert int(notebook._count["layer_0"].sum()) == 23 * 8


def test_a_run_that_fails_is_written_up_too(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    trainer = make_trainer(logger=tensorboard, callbacks=[RunNotebook(), Failure(at_step=3)], max_steps=8)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(language_model, text)
    events = read_events(tensorboard)
    values, metrics = written_hyperparameters(events)
    assert values["network/d_model"] == 16
    assert "vocabulary" not in values or len(values["vocabulary"]) <= 80
    assert "summary/last_perplexity" in metrics
    assert (Path(tensorboard.log_dir) / "00003" / "signatures" / "metadata.tsv").is_file()


def test_a_full_disk_does_not_hide_the_failure(
    language_model: LanguageModelTask,
    text: TextDataModule,
    make_trainer: MakeTrainer,
    tensorboard: TensorBoardLogger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: TensorBoardLogger, params: Any, metrics: Any = None, step: int | None = None) -> None:
        if metrics is not None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log_hyperparams", full)
    trainer = make_trainer(logger=tensorboard, callbacks=[RunNotebook(), Failure(at_step=3)], max_steps=8)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(language_model, text)


def test_best_is_that_of_the_monitored_metric_and_survives_a_checkpoint(
    classifier: ClassifierTask,
    digits: DigitsDataModule,
    make_trainer: MakeTrainer,
    tensorboard: TensorBoardLogger,
    tmp_path: Path,
) -> None:
    notebook, keeper = RunNotebook(), ModelCheckpoint(tmp_path / "kept", monitor="val/loss", mode="max")
    trainer = make_trainer(logger=tensorboard, callbacks=[notebook], max_steps=4)
    trainer.callbacks.append(keeper)
    trainer.fit(classifier, digits)
    events = read_events(tensorboard)
    loss = [event.value for event in events.Scalars("val/loss")]
    assert loss[0] > loss[1]
    assert events.Scalars("summary/best_loss")[0].value == loss[0]
    assert events.Scalars("summary/last_loss")[0].value == loss[1]
    state = torch.load(keeper.best_model_path, weights_only=True)["callbacks"]["RunNotebook"]
    resumed = RunNotebook()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["best"]["val/loss"] == pytest.approx(loss[0])


def test_other_loggers_get_nothing(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    notebook = RunNotebook()
    make_trainer(logger=CSVLogger(tmp_path, name="csv"), callbacks=[notebook, Surgeon(1)]).fit(language_model, text)
    assert notebook._count == {}
    assert {path.name for path in tmp_path.rglob("*.*") if path.is_file()} <= {"metrics.csv", "hparams.yaml", "text.txt"}


def test_a_network_without_tiles_has_hyperparameters_alone(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(kind="none")))
    make_trainer(logger=tensorboard, callbacks=[RunNotebook()]).fit(task, text)
    events = read_events(tensorboard)
    assert set(written_layout(events)) == {"loss"}
    assert written_hyperparameters(events)[0]["network/ffn/kind"] == "none"
    assert not (Path(tensorboard.log_dir) / "projector_config.pbtxt").exists()


def test_charts_are_those_of_the_metrics_that_are_there() -> None:
    assert scalar_layout([]) == {}
    assert scalar_layout(["val/loss_of_another_kind", "routing/layer_0/balance"]) == {}
    rates = [f"claims/layer_10/{part}_claim_rate" for part in ("mean", "lowest", "highest")]
    charts = scalar_layout(["tile_usage/layer_2/tile_0", *rates])["TriX"]
    assert charts == {
        "usage of the tiles, layer_2": ["Multiline", [r"^tile_usage/layer_2/tile_\d+$"]],
        "claim rate of the classes, layer_10": ["Margin", rates],
    }
    assert scalar_layout(rates[:2]) == {}


def test_history_has_the_last_act_first() -> None:
    acts = [{"operation": "freeze", "tile_idx": step, "step": step, "tag": ""} for step in range(3)]
    raised = {"operation": "raise_k", "tile_idx": -1, "step": 1, "tag": "a\nb"}
    lines = history_table({"layer_0": acts, "layer_1": [raised]}).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 2", "| 1", "| 1", "| 0"]
    assert "| 1 | layer_1 | all | raise_k | a b |" in lines
    many = [{"operation": "freeze", "tile_idx": 0, "step": step, "tag": ""} for step in range(205)]
    text = history_table({"layer_0": many})
    assert text.endswith("and 5 earlier ones")
    assert "| 5 | layer_0" in text
    assert "| 4 | layer_0" not in text


def test_class_names_stay_in_their_cells(language_model: LanguageModelTask) -> None:
    layer, count_EC = routed_layers(language_model)["layer_0"], torch.tensor([[0, 3, 1], [0, 0, 0], [0, 0, 2], [4, 0, 0]])
    names = [row[2] for row in tile_rows("layer_0", layer, count_EC, ["7", "a\tb\n", "-"])]
    assert names == ["a b", "-", "-", "class 7"]


@pytest.mark.parametrize(
    "ffn",
    [
        FFNConfig(kind="sparse_lookup_v2", num_tiles=4, top_k=1),
        FFNConfig(kind="hierarchical", num_tiles=16, d_ff=64, top_k=2),
        FFNConfig(routing="learned", num_tiles=4),
        FFNConfig(routing="hash", num_tiles=4),
    ],
    ids=["sparse_lookup", "hierarchical", "learned", "hash"],
)
def test_every_kind_of_layer_has_its_points(
    ffn: FFNConfig, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=ffn))
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor(), RunNotebook()]).fit(task, text)
    rows = (Path(tensorboard.log_dir) / "00002/signatures/metadata.tsv").read_text().splitlines()
    assert len(rows) == 1 + 2 * ffn.num_tiles
    assert sum(float(row.split("\t")[4]) for row in rows[1:]) == pytest.approx(2.0, abs=0.01)
    assert "routing/tokens" in read_events(tensorboard).Tags()["images"]


def test_every_fit_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "model: {class_path: ClassifierTask, init_args: {network: {d_model: 16, n_heads: 2, context_length: 8}}}\n"
        "data: {class_path: DigitsDataModule, init_args: {batch_size: 256}}\n"
        "trainer: {accelerator: cpu, max_steps: 2, enable_checkpointing: false, num_sanity_val_steps: 0}\n"
    )
    options = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.limit_val_batches=1"]
    assert main(["fit", "--config", "small.yaml", *options]) == 0
    assert len(list(tmp_path.glob("runs/**/signatures/tensors.tsv"))) == 1
