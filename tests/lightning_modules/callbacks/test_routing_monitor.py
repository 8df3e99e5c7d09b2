import math
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network
from tensorboard.backend.event_processing.event_accumulator import HistogramValue

from lightning_modules.callbacks import RoutingMonitor
from lightning_modules.callbacks.figures import (
    DrawingBudget,
    routing_figure,
    signature_figure,
    similarity_figure,
    usage_figure,
)
from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.callbacks.token_sample import TokenSample
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.introspection.plots import SIGNATURE_COLOURS
from trix.nn import ClassifierConfig, FFNConfig, TriXFFN
from trix.outputs import RoutingInfo


def test_statistics_over_batches_equal_those_of_the_layer_over_all() -> None:
    torch.manual_seed(0)
    layer = TriXFFN(16, 5, top_k=2).eval()
    x = torch.randn(60, 16)
    statistics = RoutingStatistics(5)
    for part in x.split(7):
        info = layer(part, return_routing=True)[1]
        statistics.update(info["tile_idx"], info["weight"], info["scores"])
    found, expected = statistics.compute(), layer.get_routing_stats(x)
    assert found["count"].sum() == 120
    assert found["usage"].tolist() == pytest.approx(expected["usage"])
    assert found["balance"] == pytest.approx(expected["balance"])
    assert found["entropy_nats"] == pytest.approx(expected["entropy"])
    assert found["relative_entropy"] == pytest.approx(expected["entropy"] / math.log(5))
    assert found["confidence"] == pytest.approx(expected["confidence"], rel=1e-5)
    assert found["max_over_mean_load"] == pytest.approx(5 * max(expected["usage"]))


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_statistics_of_nothing_are_finite(num_tiles: int) -> None:
    statistics = RoutingStatistics(num_tiles)
    statistics.update(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0, num_tiles))
    assert all(torch.isfinite(value).all() for value in statistics.compute().values())


def test_assignments_of_weight_zero_are_none() -> None:
    statistics = RoutingStatistics(3)
    statistics.update(
        torch.tensor([[0, 1], [2, 1], [0, 2], [0, 2]]), torch.tensor([[1.0, 0], [0.6, 0.4], [1, 0], [1, 0]]), torch.rand(4, 3)
    )
    found = statistics.compute()
    assert found["count"].tolist() == [3, 1, 1]
    assert found["mean_k"] == 1.25


def test_collapse_is_visible() -> None:
    statistics = RoutingStatistics(4)
    statistics.update(torch.full((9, 1), 2), torch.ones(9, 1), torch.rand(9, 4))
    found = statistics.compute()
    assert (found["balance"], found["entropy_nats"], found["max_over_mean_load"]) == (0, 0, 4)


def test_writes_scalars_figures_and_histograms_for_tensorboard(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor()], num_sanity_val_steps=1).fit(language_model, text)
    events = read_events(tensorboard)
    tags = events.Tags()
    assert set(tags["images"]) == {f"routing/{name}" for name in ("signatures", "usage", "similarity", "tokens")}
    kinds = ("tiles", "confidences")
    assert set(tags["histograms"]) == {f"routing/layer_{layer}/{kind}" for layer in (0, 1) for kind in kinds}
    for name in ("balance", "entropy_nats", "relative_entropy", "max_over_mean_load", "confidence", "mean_k"):
        assert [event.step for event in events.Scalars(f"routing/layer_1/{name}")] == [1]  # not at the sanity check
    histogram = events.Histograms("routing/layer_0/tiles")[0]
    assert histogram.histogram_value.num == 23 * 8
    assert sum(histogram.histogram_value.bucket) == 23 * 8
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (-0.5, 3.5)  # buckets of one width
    usage = [events.Scalars(f"tile_usage/layer_0/tile_{tile}")[0].value for tile in range(4)]
    assert usage == pytest.approx([count / (23 * 8) for count in _per_tile(histogram.histogram_value)])
    gaps = events.Histograms("routing/layer_0/confidences")[0].histogram_value
    assert gaps.num == 23 * 8
    assert gaps.sum / gaps.num == pytest.approx(events.Scalars("routing/layer_0/confidence")[0].value, rel=1e-4)
    assert "routing/layer_0/churn" not in tags["scalars"]  # there was nothing before
    assert plt.get_fignums() == []  # pyplot holds nothing


def _per_tile(histogram: HistogramValue) -> list[float]:
    """Counts by tile, of buckets that end half a tile above it; TensorBoard adds empty ones."""
    count = dict.fromkeys(range(4), 0.0)
    for limit, number in zip(histogram.bucket_limit, histogram.bucket, strict=True):
        if number:
            count[int(limit - 0.5)] += number
    return list(count.values())


class Validations(L.Callback):
    """Notes the best tile of every token at each validation."""

    def __init__(self) -> None:
        self.tiles: list[dict[str, torch.Tensor]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tiles.append({})

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        for name, info in outputs["routing"].items():
            best = info["tile_idx"][..., 0].flatten()
            self.tiles[-1][name] = torch.cat([self.tiles[-1].get(name, best[:0]), best])


def test_churn_is_the_share_of_tokens_that_moved(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    class Rotation(L.Callback):
        """Between the validations some tiles are given another's signature."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                layer = routed_layers(pl_module)["layer_1"]
                layer.insert_signature(0, -layer.get_tile_signatures()[0])

    noted = Validations()
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor(figures=False), noted, Rotation()], max_steps=4).fit(
        language_model, text
    )
    events = read_events(tensorboard)
    before, after = noted.tiles
    for name in ("layer_0", "layer_1"):
        expected = (before[name] != after[name]).float().mean().item()
        assert [event.value for event in events.Scalars(f"routing/{name}/churn")] == pytest.approx([expected])
    assert events.Scalars("routing/layer_1/churn")[0].value > 0


def test_there_is_no_churn_between_different_tokens(text: TextDataModule, language_model: LanguageModelTask) -> None:
    batches = list(text.val_dataloader())
    samples = [TokenSample() for _ in range(3)]
    language_model.eval()  # in training the balance bias moves
    with torch.no_grad():
        for sample, batch in zip(samples, (batches[0], batches[0], batches[1]), strict=True):
            sample.update(language_model.validation_step(batch), batch, language_model)
    assert samples[1].num_changed(samples[0].state(), "layer_0") == (0, 40)
    assert samples[2].num_changed(samples[0].state(), "layer_0") is None
    assert samples[2].num_changed({}, "layer_0") is None


def test_a_sample_ends_with_its_last_token_and_begins_with_the_first_sequence(
    text: TextDataModule, language_model: LanguageModelTask
) -> None:
    sample, batch = TokenSample(), next(iter(text.val_dataloader()))
    with torch.no_grad():
        outputs = language_model.validation_step(batch)
        for _ in range(60):  # of 40 tokens each
            sample.update(outputs, batch, language_model)
    assert {len(tile_N) for tile_N in sample.tile_N.values()} == {2048}
    assert len(sample.label_N) == 2048
    assert "".join(sample.tokens) == "".join(text.vocabulary[index] for index in batch[0][0])
    assert torch.equal(sample.first["layer_1"]["tile_idx"], outputs["routing"]["layer_1"]["tile_idx"][0])


def test_padding_is_no_part_of_the_first_sequence() -> None:
    data = LanguageIdDataModule(batch_size=16, context_length=48)
    network = ClassifierConfig(16, 2, 2, context_length=48, ffn=FFNConfig(num_tiles=4, top_k=1))
    task = ClassifierTask(None, data.num_classes, data.class_names, network, vocabulary=data.vocabulary)
    for batch in data.val_dataloader():
        num_tokens = int((batch[0][0] != 0).sum())
        if num_tokens < 48:
            break
    sample = TokenSample()
    with torch.no_grad():
        sample.update(task.validation_step(batch), batch, task)
    assert len(sample.tokens) == len(sample.first["layer_0"]["tile_idx"]) == num_tokens < 48


def test_a_resumed_run_knows_the_tiles_of_the_validation_before(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[RoutingMonitor()])
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(callbacks=[RoutingMonitor()], max_steps=4)
    trainer.fit(language_model, text, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert "routing/layer_0/churn" in trainer.callback_metrics
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["RoutingMonitor"]["earlier"]
    assert state["tile"]["layer_1"].shape == (23 * 8,)


def test_many_tiles_have_no_scalars_of_their_own(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[RoutingMonitor()])
    trainer.fit(LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=33, d_ff=66, top_k=1))), text)
    assert "routing/layer_0/balance" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if name.startswith("tile_usage")]


def test_a_long_run_draws_before_its_end(
    language_model: LanguageModelTask,
    text: TextDataModule,
    make_trainer: MakeTrainer,
    tensorboard: TensorBoardLogger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    due = iter([True, False, False])
    monkeypatch.setattr(DrawingBudget, "is_due", lambda _: next(due))
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor()], max_steps=6).fit(language_model, text)
    assert [image.step for image in read_events(tensorboard).Images("routing/tokens")] == [2, 6]


def test_drawing_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("lightning_modules.callbacks.figures.time.thread_time", lambda: now)
    budget = DrawingBudget(share=0.25, first_cost_s=1.0)
    now = 103.9
    assert not budget.is_due()
    now = 104.0
    assert budget.is_due()
    with budget.drawing():
        now = 106.0
    now = 113.9
    assert not budget.is_due()
    now = 114.0
    assert budget.is_due()


def test_figures_can_be_left_out(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor(figures=False)]).fit(language_model, text)
    assert read_events(tensorboard).Tags()["images"] == []


def test_a_layer_of_one_tile_is_measured(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=1, d_ff=32)))
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor()]).fit(task, text)
    events = read_events(tensorboard)
    assert events.Scalars("tile_usage/layer_0/tile_0")[-1].value == 1.0
    assert "routing/usage" in events.Tags()["images"]


def test_other_loggers_get_the_scalars(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: object
) -> None:
    logger = CSVLogger(str(tmp_path))
    trainer = make_trainer(logger=logger, callbacks=[RoutingMonitor()])
    trainer.fit(language_model, text)
    assert 0 <= trainer.callback_metrics["routing/layer_0/relative_entropy"] <= 1


def test_a_network_without_tiles_has_nothing_to_report(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[RoutingMonitor()])
    trainer.fit(LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(kind="none"))), text)
    assert not [name for name in trainer.callback_metrics if name.startswith("routing")]


def test_signature_figure_shows_each_value_in_its_colour(language_model: LanguageModelTask) -> None:
    signatures = {name: layer.get_tile_signatures() for name, layer in routed_layers(language_model).items()}
    figure = signature_figure(signatures)
    assert [axis.get_title() for axis in figure.axes] == list(signatures)
    image = figure.axes[0].images[0]
    for value, colour in SIGNATURE_COLOURS.items():
        rgba = image.cmap(image.norm(value))
        assert tuple(round(part * 255) for part in rgba[:3]) == tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["-1", "0", "+1"]


def test_similarity_figure_has_a_heat_map_for_each_layer() -> None:
    signatures = {f"layer_{index}": torch.tensor([[1, 1, 0, 0], [1, -1, 0, 0], [-1, -1, 0, 0]]) for index in range(3)}
    figure = similarity_figure(signatures)
    images = [axis.images[0] for axis in figure.axes[:3]]
    assert [axis.get_title() for axis in figure.axes[:3]] == list(signatures)
    for image in images:
        np.testing.assert_allclose(image.get_array(), [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-6)


def test_routing_figure_marks_the_tiles_that_were_used() -> None:
    info: RoutingInfo = {
        "tile_idx": torch.tensor([[0, 1], [2, 0]]),
        "weight": torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
        "scores": torch.tensor([[2.0, 1.0, -torch.inf], [0.0, -torch.inf, 1.0]]),
    }
    figure = routing_figure({"layer_0": info}, ["$", "\n"])
    axis = figure.axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[0, 0], [1, 2], [1, 0]]
    assert axis.images[0].get_array()[:, 0].tolist() == pytest.approx([0.731, 0.269, 0.0], abs=1e-3)
    assert [label.get_text() for label in axis.get_xticklabels()] == [r"\$", "⏎"]


def test_usage_figure_has_a_bar_for_each_tile() -> None:
    figure = usage_figure({"layer_0": torch.tensor([0.25, 0.75]), "layer_1": torch.tensor([1.0])})
    assert [[bar.get_height() for bar in axis.patches] for axis in figure.axes] == [[0.25, 0.75], [1.0]]
