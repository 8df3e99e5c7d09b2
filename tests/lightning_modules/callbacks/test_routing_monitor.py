import math

import matplotlib.pyplot as plt
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network

from lightning_modules.callbacks import RoutingMonitor
from lightning_modules.callbacks.figures import signature_figure, usage_figure
from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask
from trix.introspection.plots import SIGNATURE_COLOURS
from trix.nn import FFNConfig, TriXFFN


def test_statistics_over_batches_equal_those_of_the_layer_over_all() -> None:
    torch.manual_seed(0)
    layer = TriXFFN(16, 5, top_k=2).eval()
    x = torch.randn(60, 16)
    statistics = RoutingStatistics(5)
    for part in x.split(7):
        info = layer(part, return_routing=True)[1]
        statistics.update(info["tile_idx"], info["scores"])
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
    statistics.update(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, num_tiles))
    assert all(torch.isfinite(value).all() for value in statistics.compute().values())


def test_collapse_is_visible() -> None:
    statistics = RoutingStatistics(4)
    statistics.update(torch.full((9, 1), 2), torch.rand(9, 4))
    found = statistics.compute()
    assert (found["balance"], found["entropy_nats"], found["max_over_mean_load"]) == (0, 0, 4)


def test_writes_scalars_figures_and_histograms_for_tensorboard(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor()], num_sanity_val_steps=1).fit(language_model, text)
    events = read_events(tensorboard)
    tags = events.Tags()
    assert set(tags["images"]) == {"routing/signatures", "routing/usage"}
    assert set(tags["histograms"]) == {"routing/layer_0/tiles", "routing/layer_1/tiles"}
    for name in ("balance", "entropy_nats", "relative_entropy", "max_over_mean_load", "confidence"):
        assert [event.step for event in events.Scalars(f"routing/layer_1/{name}")] == [1]  # not at the sanity check
    histogram = events.Histograms("routing/layer_0/tiles")[0]
    assert histogram.histogram_value.num == 23 * 8
    assert sum(histogram.histogram_value.bucket) == 23 * 8
    assert plt.get_fignums() == []  # pyplot holds nothing


def test_figures_can_be_left_out(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    make_trainer(logger=tensorboard, callbacks=[RoutingMonitor(figures=False)]).fit(language_model, text)
    assert read_events(tensorboard).Tags()["images"] == []


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


def test_usage_figure_has_a_bar_for_each_tile() -> None:
    figure = usage_figure({"layer_0": torch.tensor([0.25, 0.75]), "layer_1": torch.tensor([1.0])})
    assert [[bar.get_height() for bar in axis.patches] for axis in figure.axes] == [[0.25, 0.75], [1.0]]
