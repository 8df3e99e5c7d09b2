"""Training, resuming, reading and exporting under each precision of Lightning's trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import SENTENCE, MakeTrainer, small_network
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.cli import main
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ClassifierTask, LanguageModelTask, RoutedTask, load_checkpoint
from trix.nn import ClassifierConfig, FFNConfig

DTYPES = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "32-true": torch.float32,
}
KINDS = {
    "explicit": FFNConfig(num_tiles=4, routing="explicit", diversity_weight=0.1),
    "emergent": FFNConfig(num_tiles=4, top_k=2, diversity_weight=0.1),
    "adaptive": FFNConfig(num_tiles=4, max_k=3),
    "learned": FFNConfig(num_tiles=4, routing="learned"),
    "hash": FFNConfig(num_tiles=4, routing="hash"),
    "hierarchical": FFNConfig("hierarchical", num_tiles=8, tiles_per_cluster=2, num_probes=2),
    "sparse_lookup": FFNConfig("sparse_lookup", num_tiles=4),
    "sparse_lookup_v2": FFNConfig("sparse_lookup_v2", num_tiles=4),
    "dense": FFNConfig("dense"),
}
Make = Callable[[], tuple[RoutedTask, L.LightningDataModule]]


def optimizer(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=2e-3, eps=1e-3)  # the usual eps is 0 in float16


def floats_of(state: dict[str, Any]) -> set[torch.dtype]:
    """The dtypes of the weights, apart from what a router keeps in at least float32."""
    return {value.dtype for name, value in state.items() if isinstance(value, Tensor) and name.endswith("weight")}


def assert_goes_on_as_if_nothing_had_been(make: Make, precision: str, folder: Path, make_trainer: MakeTrainer) -> None:
    def fit(**settings: Any) -> L.Trainer:
        L.seed_everything(0)
        task, data = make()
        keeper = ModelCheckpoint(folder, "a", every_n_train_steps=3)
        settings_of_trainer = {"precision": precision, "max_steps": 4, "limit_val_batches": 1, "log_every_n_steps": 1}
        settings_of_trainer |= {"callbacks": [keeper], "enable_checkpointing": True}
        trainer = make_trainer(**settings_of_trainer, val_check_interval=1, gradient_clip_val=1.0)
        trainer.fit(task, data, **settings)
        assert torch.get_default_dtype() == torch.float32
        return trainer

    whole = fit()
    resumed = fit(ckpt_path=folder / "a.ckpt", weights_only=True)
    assert resumed.callback_metrics["val/loss"].isfinite()
    states = [trainer.lightning_module.state_dict() for trainer in (whole, resumed)]
    assert floats_of(states[0]) == {DTYPES[precision]}
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert not isinstance(value, Tensor) or torch.equal(value, states[1][name]), name
    stored = torch.load(folder / "a.ckpt", weights_only=True)["state_dict"]
    assert floats_of(stored) == {DTYPES[precision]}
    task, _ = load_checkpoint(folder / "a.ckpt")
    assert floats_of(task.state_dict()) == {torch.float32}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_trains_and_goes_on(
    kind: str, precision: str, text: TextDataModule, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def make() -> tuple[RoutedTask, L.LightningDataModule]:
        network = small_network(ffn=KINDS[kind], ternary_attention=True)
        return LanguageModelTask(text.vocabulary, network, optimizer, lr_scheduler=None), text

    assert_goes_on_as_if_nothing_had_been(make, precision, tmp_path, make_trainer)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hash"])  # which needs tokens
def test_a_classifier_trains_and_goes_on(
    kind: str, precision: str, digits: DigitsDataModule, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    def make() -> tuple[RoutedTask, L.LightningDataModule]:
        network = ClassifierConfig(16, 1, 2, context_length=8, ffn=KINDS[kind])
        return ClassifierTask(8, digits.num_classes, digits.class_names, network, optimizer, lr_scheduler=None), digits

    assert_goes_on_as_if_nothing_had_been(make, precision, tmp_path, make_trainer)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_loss_is_exact_in_half_precision(precision: str, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    (tmp_path / "text.txt").write_text(SENTENCE * 90)
    text = TextDataModule(path=tmp_path / "text.txt", context_length=8, batch_size=5, batches_per_epoch=4)
    L.seed_everything(0)
    task = LanguageModelTask(text.vocabulary, small_network())
    (found,) = make_trainer(precision=precision).validate(task, text)
    task.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(task.network(token_BT).double().flatten(0, 1), target_BT.flatten(), reduction="none")
            for token_BT, target_BT in text.val_dataloader()
        ]
    assert sum(len(loss) for loss in losses) > 500
    assert found["val/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES.values()), key=str))
def test_statistics_are_float32_under_every_default(dtype: torch.dtype) -> None:
    tile_idx = torch.cat([torch.zeros(1001, 1), torch.ones(2002, 1)]).long()
    score = torch.tensor([0.3, 0.1, 0.0]).expand(3003, 3)
    torch.set_default_dtype(dtype)
    try:
        statistics = RoutingStatistics(3)
        for _ in range(3):
            statistics.update(tile_idx, torch.ones(3003, 1), score)
        found = statistics.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for name, value in found.items() if name != "count"} == {torch.float32}
    assert found["usage"].tolist() == pytest.approx([1 / 3, 2 / 3, 0.0], rel=1e-6)
    assert found["mean_k"].item() == 1.0
    assert found["confidence"].item() == pytest.approx(0.2, rel=1e-4)


EVENT = {"action": "insert", "tiles": [3], "step": 1, "signature": {"positive_dims": [0], "negative_dims": [1]}, "tag": "t"}
CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "LanguageModelTask",
        "init_args": {
            "network": {"d_model": 16, "num_layers": 1, "n_heads": 2, "context_length": 8, "ffn": {"num_tiles": 4}},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.002, "eps": 0.001}},
        },
    },
    "data": {
        "class_path": "TextDataModule",
        "init_args": {"path": "text.txt", "context_length": 8, "batch_size": 5, "batches_per_epoch": 8},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "small"}},
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}},
            {"class_path": "DiversityMonitor", "init_args": {"every_n_steps": 2}},
            {"class_path": "RoutingMonitor"},
            {"class_path": "ClaimMonitor"},
            {"class_path": "Evolution", "init_args": {"policy": {"every_n_steps": 1, "warmup": 1, "reseed_below": 0.9}}},
            {"class_path": "SurgerySchedule", "init_args": {"events": [EVENT]}},
        ],
    },
    "report": {"num_tokens": 0},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SENTENCE * 30)
    Path("small.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.mark.usefixtures("drawn_figures")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_every_callback_and_command_takes_it(precision: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", f"--trainer.precision={precision}"]) == 0
    last = Path("runs/small/version_0/checkpoints/last.ckpt")
    assert main(["inspect", str(last), "--output", "page.html", "--num-tokens", "64"]) == 0
    assert main(["why", str(last), "--prompt", "The "]) == 0
    capfd.readouterr()

    # The network is read in float32, and exported and verified so.
    assert main(["export", "--ckpt", str(last), "--output", "model.onnx", "--held-out-tokens", "64"]) == 0
    assert "parity  with torch on 64 held-out tokens" in capfd.readouterr().out
    kinds = {tensor.data_type for tensor in onnx.load("model.onnx").graph.initializer}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.UINT8}

    # Surgery leaves the weights in the floats of the training, and the training goes on from them.
    where = ["--layer", "0", "--tile", "1", "--tag", "t", "--output", "new.ckpt"]
    assert main(["surgery", str(last), "unfreeze", *where]) == 0
    old, new = (torch.load(path, weights_only=True)["state_dict"] for path in (last, "new.ckpt"))
    changed = {name for name, value in old.items() if isinstance(value, Tensor) and not torch.equal(value, new[name])}
    assert changed
    assert all(".blocks.0.feed_forward.inner." in name for name in changed)
    assert floats_of(old) == floats_of(new) == {DTYPES[precision]}
    arguments = ["fit", "--resume", "new.ckpt", "--config", "small.yaml", f"--trainer.precision={precision}"]
    assert main([*arguments, "--trainer.max_steps=3", "--trainer.limit_val_batches=0"]) == 0


def test_an_eps_that_float16_does_not_hold_is_refused(
    folder: Path, text: TextDataModule, make_trainer: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--config", "small.yaml", "--trainer.precision=16-true", "--model.optimizer.eps=1e-8"]
    assert main(arguments) == 2
    problem = "model.optimizer.eps (1e-08) must be >= 6e-08 with trainer.precision 16-true"
    assert capfd.readouterr().err.startswith(f"trix: error: {problem}: 0.001 is usual there")
    assert not Path("runs").exists()
    with pytest.raises(UserError, match=r"eps \(1e-08\) must be >= 6e-08"):
        make_trainer(precision="16-true").fit(LanguageModelTask(text.vocabulary, small_network()), text)
