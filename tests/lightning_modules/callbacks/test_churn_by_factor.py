"""What of the choice moved the tokens, features, signatures or bias; and the warning where too many move."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import MakeTrainer, small_network
from torch import Tensor

from lightning_modules.callbacks import RoutingMonitor
from lightning_modules.callbacks.routing_factors import FACTORS, RoutingFactors, num_moved
from lightning_modules.callbacks.token_sample import TokenSample
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig, RoutedLayer
from trix.routing import SignatureRouter

# The rate of the balance bias and of the optimizer is 0: only what the test changes moves.
NETWORKS: dict[str, dict[str, Any]] = {
    "emergent": {"ffn": FFNConfig(num_tiles=4, route_on="hidden", balance_rate=0.0)},
    "explicit": {"ffn": FFNConfig(num_tiles=4, routing="explicit", balance_rate=0.0)},
    "two tiles": {"ffn": FFNConfig(num_tiles=4, top_k=2, balance_rate=0.0)},
    "hierarchical": {"ffn": FFNConfig("hierarchical", num_tiles=4, route_on="hidden", balance_rate=0.0)},
    "learned": {"ffn": FFNConfig(num_tiles=4, routing="learned", route_on="hidden", balance_rate=0.0)},
    "lookup": {"ffn": FFNConfig("sparse_lookup", num_tiles=4, route_on="hidden", balance_rate=0.0)},
    "lookup v2": {"ffn": FFNConfig("sparse_lookup_v2", num_tiles=4, balance_rate=0.0)},
    "context": {"ffn": FFNConfig(num_tiles=4, route_on="context", balance_rate=0.0)},
    "halting": {"ffn": FFNConfig(num_tiles=4, balance_rate=0.0), "halt_threshold": 0.2},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def task(text: TextDataModule, **network: Any) -> LanguageModelTask:
    L.seed_everything(0)
    return LanguageModelTask(text.vocabulary, small_network(**network), still, None)


@torch.no_grad()
def change_features(model: LanguageModelTask) -> None:
    for name, buffer in model.network.named_buffers():
        if "table_VD" in name:
            buffer.copy_(buffer.roll(1, dims=0))
    embedding = next(p for p in model.network.parameters() if p.dim() == 2 and len(p) == len(model.vocabulary))
    embedding.copy_(embedding.roll(1, dims=0))


@torch.no_grad()
def change_signatures(model: LanguageModelTask) -> None:
    for layer in routed_layers(model).values():
        if isinstance(layer.router, SignatureRouter):
            layer.insert_signature(0, -layer.get_tile_signatures()[0])
        else:
            layer.router.gate_ED[0].neg_()


@torch.no_grad()
def change_bias(model: LanguageModelTask) -> None:
    for layer in routed_layers(model).values():
        layer.router.balance_bias.add_(torch.linspace(-2.0, 2.0, 4))


CHANGES: dict[str, Callable[[LanguageModelTask], None]] = {
    "features": change_features,
    "signatures": change_signatures,
    "bias": change_bias,
}


class Change(L.Callback):
    """Changes one thing between the first validation and the second."""

    def __init__(self, factor: str) -> None:
        self.factor = factor

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            CHANGES[self.factor](pl_module)


@pytest.mark.parametrize("factor", FACTORS)
@every_network
def test_a_change_of_one_factor_shows_in_that_number_alone(
    name: str, factor: str, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    model = task(text, **NETWORKS[name])
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False), Change(factor)], max_steps=4)
    trainer.fit(model, text)
    # Only the first layer: what it changes in its output is what the next one reads.
    found = {key: float(trainer.callback_metrics[f"routing/layer_0/churn_{key}"]) for key in FACTORS}
    churn = float(trainer.callback_metrics["routing/layer_0/churn"])
    assert churn > 0.05
    assert found == {key: pytest.approx(churn if key == factor else 0.0) for key in FACTORS}
    assert not any(part._forward_pre_hooks for layer in routed_layers(model).values() for part in (layer, layer.router))


def test_the_change_of_a_layer_is_the_next_ones_change_of_features(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    model = task(text, **NETWORKS["emergent"])

    class First(Change):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                routed_layers(pl_module)["layer_0"].router.balance_bias.add_(torch.linspace(-5.0, 5.0, 4))

    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False), First("bias")], max_steps=4)
    trainer.fit(model, text)
    metrics = trainer.callback_metrics
    assert metrics["routing/layer_1/churn_features"] == metrics["routing/layer_1/churn"] > 0
    assert metrics["routing/layer_1/churn_signatures"] == metrics["routing/layer_1/churn_bias"] == 0


def test_the_numbers_are_those_of_their_definition() -> None:
    torch.manual_seed(0)
    before, now = (RoutingFactors(torch.randn(200, 8), torch.randn(5, 8), torch.randn(5)) for _ in range(2))
    now.bias[2] = -torch.inf

    def best(x_ND: Tensor, direction_ED: Tensor, bias_E: Tensor) -> Tensor:
        return (x_ND @ direction_ED.T + bias_E).argmax(dim=-1)

    first = best(before.features, before.signatures, before.bias)
    assert num_moved(before, now) == {
        "features": int((best(now.features, before.signatures, before.bias) != first).sum()),
        "signatures": int((best(before.features, now.signatures, before.bias) != first).sum()),
        "bias": int((best(before.features, before.signatures, now.bias) != first).sum()),
    }


@pytest.mark.parametrize("routing", ["hash", "scattering"])
def test_there_are_no_parts_where_the_choice_is_no_matter_of_directions(
    routing: str, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    network = {"ffn": FFNConfig(num_tiles=4, routing=routing), "mixer": "resolvent"}
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False)], max_steps=4)
    trainer.fit(task(text, **network), text)
    assert "routing/layer_0/churn" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if "churn_" in name]


def taken(model: L.LightningModule, batch: Any) -> TokenSample:
    """A sample by way of the monitor, as a validation takes it."""
    monitor, trainer = RoutingMonitor(), L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    monitor.on_validation_epoch_start(trainer, model)
    with torch.no_grad():
        monitor.on_validation_batch_start(trainer, model, batch, 0)
        monitor.on_validation_batch_end(trainer, model, model.eval().validation_step(batch), batch, 0)
    return monitor._sample


def assert_tiles_follow_from_the_factors(sample: TokenSample) -> None:
    state = sample.state()
    assert set(state["factors"]) == set(state["tile"]) != set()
    for name, tile_N in state["tile"].items():
        assert torch.equal(RoutingFactors(**state["factors"][name]).best_tile(), tile_N.long())


@every_network
def test_the_tiles_follow_from_what_is_kept(name: str, text: TextDataModule) -> None:
    model = task(text, **NETWORKS[name])
    with torch.no_grad():
        for layer in routed_layers(model).values():
            torch.nn.init.normal_(layer.router.balance_bias, std=0.2)
    assert_tiles_follow_from_the_factors(taken(model, next(iter(text.val_dataloader()))))


def test_padding_is_left_out() -> None:
    L.seed_everything(0)
    data = LanguageIdDataModule(batch_size=16, context_length=48)
    network = ClassifierConfig(16, 2, 2, context_length=48, ffn=FFNConfig(num_tiles=4, route_on="hidden"))
    model = ClassifierTask(None, data.num_classes, data.class_names, network, vocabulary=data.vocabulary)
    batch = next(batch for batch in data.val_dataloader() if bool((batch[0] == 0).any()))
    sample = taken(model, batch)
    assert len(sample.tile_N["layer_0"]) == int((batch[0] != 0).sum())
    assert_tiles_follow_from_the_factors(sample)


def test_a_file_holds_what_all_layers_read_once_and_no_more_of_a_batch_than_the_sample(text: TextDataModule) -> None:
    batch = next(iter(text.val_dataloader()))
    many = tuple(part.repeat(600, 1) for part in batch)  # 24 000 tokens
    size = {}
    for route_on in ("embedding", "hidden"):
        model = task(text, ffn=FFNConfig(num_tiles=4, route_on=route_on))
        state, file = taken(model, many).state(), io.BytesIO()
        torch.save(state, file)
        size[route_on] = len(file.getvalue())
        features = [factors["features"] for factors in state["factors"].values()]
        assert [value.shape for value in features] == [(2048, 16)] * 2
        assert (features[0] is features[1]) == (route_on == "embedding")
    num_bytes = 2048 * 16 * 4
    assert num_bytes < size["embedding"] < 1.3 * num_bytes
    assert 2 * num_bytes < size["hidden"] < 2.3 * num_bytes


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def model() -> LanguageModelTask:
        L.seed_everything(0)
        ffn = FFNConfig(num_tiles=4, route_on="hidden", balance_rate=0.2)
        return LanguageModelTask(text.vocabulary, small_network(ffn=ffn), lambda p: torch.optim.SGD(p, lr=3.0), None)

    class Save(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, rest = RoutingMonitor(figures=False), RoutingMonitor(figures=False)
    first = make_trainer(callbacks=[whole, Save()], max_steps=4)
    first.fit(model(), text)
    second = make_trainer(callbacks=[rest], max_steps=4)
    second.fit(model(), text, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    names = [f"routing/layer_{layer}/churn{part}" for layer in (0, 1) for part in ("", *(f"_{name}" for name in FACTORS))]
    assert {name: second.callback_metrics[name] for name in names} == {name: first.callback_metrics[name] for name in names}
    assert any(first.callback_metrics[name] > 0 for name in names)


def test_a_file_of_before_the_parts_were_known_is_gone_on_from(
    text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False)])
    trainer.fit(task(text), text)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    earlier = checkpoint["callbacks"]["RoutingMonitor"]["earlier"]
    checkpoint["callbacks"]["RoutingMonitor"] = {"earlier": {key: earlier[key] for key in ("label", "tile")}}
    torch.save(checkpoint, tmp_path / "half.ckpt")
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False)], max_steps=4)
    trainer.fit(task(text), text, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert "routing/layer_0/churn" in trainer.callback_metrics
    assert "routing/layer_0/churn_bias" not in trainer.callback_metrics


class Swap(L.Callback):
    """At some steps every token of the first layer goes elsewhere, for the sake of one factor."""

    def __init__(self, factor: str, *steps: int) -> None:
        self.factor, self.steps = factor, steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps:
            layer: RoutedLayer = routed_layers(pl_module)["layer_0"]
            if self.factor == "signatures":
                for tile, signature in enumerate(layer.get_tile_signatures().roll(1, dims=0)):
                    layer.insert_signature(tile, signature)
            else:
                layer.router.balance_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]).roll(trainer.global_step))


def warned(trainer: L.Trainer, model: L.LightningModule, text: TextDataModule, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, text, **settings)
    return [str(warning.message) for warning in caught if "of the tokens changed tile" in str(warning.message)]


@pytest.mark.parametrize(("factor", "steps"), [("bias", (7, 9, 11)), ("signatures", (7,))])
def test_churn_in_the_second_half_is_warned_of_once(
    factor: str, steps: tuple[int, ...], text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monitor = RoutingMonitor(figures=False)
    trainer = make_trainer(callbacks=[monitor, Swap(factor, *steps)], max_steps=12)
    found = warned(trainer, task(text, **NETWORKS["explicit"]), text)
    assert len(found) == 1
    (message,) = found
    assert message.startswith("layer_0: ")
    assert f"from step 6 to 8, mostly by its {factor} (each alone: features 0%, " in message
    assert "per 50 steps in the second half of the training" in message
    assert "route_on: context" in message
    assert "signatures: drawn" in message
    assert "balance_rate: 0" in message
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_trainer(callbacks=[RoutingMonitor(figures=False), Swap(factor, 13)], max_steps=14)
    assert not warned(resumed, task(text, **NETWORKS["explicit"]), text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_churn_in_the_first_half_is_not_warned_of(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False), Swap("bias", 3, 5)], max_steps=12)
    assert not warned(trainer, task(text, **NETWORKS["explicit"]), text)


@pytest.mark.parametrize(("max_epochs", "is_warned"), [(4, True), (5, False), (-1, False)])
def test_a_training_of_epochs_has_a_second_half_too(
    max_epochs: int, is_warned: bool, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    settings = {"max_steps": -1, "max_epochs": max_epochs, "val_check_interval": None, "max_time": None}
    if max_epochs < 0:
        settings = {"max_steps": -1, "max_epochs": -1, "val_check_interval": None, "max_time": {"seconds": 2}}
    trainer = make_trainer(callbacks=[RoutingMonitor(figures=False), Swap("bias", 9)], **settings)  # in the third epoch
    assert bool(warned(trainer, task(text, **NETWORKS["explicit"]), text)) == is_warned


@pytest.mark.parametrize(("num_steps", "churn", "is_warned"), [(50, 0.09, False), (50, 0.11, True), (100, 0.18, False)])
@pytest.mark.parametrize("is_longer", [False, True])
def test_the_limit_holds_for_50_steps(num_steps: int, churn: float, is_warned: bool, is_longer: bool) -> None:
    """0.18 of 100 steps is 0.09 of each 50: 0.91^2 = 0.83."""
    monitor, trainer = RoutingMonitor(), L.Trainer(max_steps=400, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.state.fn = "fit"
    monitor._earlier = {"step": 200}
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 200 + num_steps
    assert trainer.global_step == 200 + num_steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor._warn("layer_0", churn + (0.02 if is_longer and num_steps == 100 else 0.0), {}, trainer)
    assert bool(caught) == (is_warned or (is_longer and num_steps == 100))


def test_no_hook_outlives_a_run_that_fails(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    class Fails(LanguageModelTask):
        def validation_step(self, batch: Any) -> Any:
            raise RuntimeError("in the middle of a validation")

    L.seed_everything(0)
    model = Fails(text.vocabulary, small_network())
    with pytest.raises(RuntimeError, match="in the middle"):
        make_trainer(callbacks=[RoutingMonitor()]).fit(model, text)
    assert not any(part._forward_pre_hooks for layer in routed_layers(model).values() for part in (layer, layer.router))
