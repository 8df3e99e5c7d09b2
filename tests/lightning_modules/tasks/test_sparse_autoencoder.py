"""The task of sparse autoencoders: it learns what a bare loop learns, resumes exactly, and measures over all tokens."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_dumps import small_dump
from small_runs import MakeTrainer, read_events
from torch import Tensor

from lightning_modules.data import RunData
from lightning_modules.data.activations import ActivationDataModule
from lightning_modules.errors import DataError, UserError
from lightning_modules.tasks import AutoencoderConfig, SparseAutoencoderTask, load_autoencoder, load_checkpoint
from trix.superposition.sae import ARCHITECTURES, Transcoder
from trix.superposition.sae.train import take_step

CONFIG = AutoencoderConfig("topk", 48, {"active": 4, "dead_window": 500})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_dump(tmp_path_factory.mktemp("dump"), ("resid_pre.1", "ffn_out.1"))


def data(folders: list[Path], **settings: Any) -> ActivationDataModule:
    return ActivationDataModule(str(folders[0]), batch_size=200, validation_fraction=0.2, **settings)


def task(width: int = 32, autoencoder: AutoencoderConfig = CONFIG, **settings: Any) -> SparseAutoencoderTask:
    torch.manual_seed(0)
    return SparseAutoencoderTask(width, autoencoder=autoencoder, **{"lr_scheduler": None, **settings})


def fit(
    task: SparseAutoencoderTask, data: ActivationDataModule, folder: Path, steps: int, ckpt: Path | None = None
) -> L.Trainer:
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data, ckpt_path=ckpt, weights_only=True)
    return trainer


def states(task: SparseAutoencoderTask) -> dict[str, Tensor]:
    return {name: value for name, value in task.state_dict().items() if name.startswith("network.")}


def assert_equal(ours: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert ours.keys() == its.keys()
    for name, value in ours.items():
        assert torch.equal(value, its[name]), name


@pytest.mark.parametrize("name", ARCHITECTURES.names)
def test_it_learns_what_a_bare_loop_learns_to_the_bit(name: str, folders: list[Path], tmp_path: Path) -> None:
    trained = task(autoencoder=AutoencoderConfig(name, 48))
    fit(trained, data(folders), tmp_path, 14)
    bare = task(autoencoder=AutoencoderConfig(name, 48))
    sae = bare.autoencoders["sae"]
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    loader = data(folders).train_dataloader()
    batches = [batch for _ in range(3) for batch in loader][:14]
    sae.start_from(*batches[0])
    for batch in batches:
        take_step(sae, optimizer, *batch)
    assert_equal(states(trained), states(bare))


@pytest.mark.parametrize(
    ("name", "restraint"), [("topk", None), ("batch_topk", None), ("topk", "soft_frozen_decoder"), ("topk", "frozen_encoder")]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    name: str, restraint: str | None, folders: list[Path], tmp_path: Path
) -> None:
    config = AutoencoderConfig(name, 48, {"active": 4, "dead_window": 500}, restraint)
    whole, resumed, part = (task(autoencoder=config) for _ in range(3))
    fit(whole, data(folders), tmp_path / "whole", 13)
    fit(part, data(folders), tmp_path / "part", 6)
    fit(resumed, data(folders), tmp_path / "rest", 13, tmp_path / "part" / "step=6.ckpt")
    assert_equal(states(whole), states(resumed))


def test_several_learn_as_each_would_alone(folders: list[Path], tmp_path: Path) -> None:
    small = AutoencoderConfig("batch_topk", 16, {"active": 2})
    together = task(others={"small": small})
    first = {name: value.clone() for name, value in together.network["small"].state_dict().items()}
    fit(together, data(folders), tmp_path / "together", 7)
    alone = task()
    fit(alone, data(folders), tmp_path / "alone", 7)
    assert_equal({name: value for name, value in states(together).items() if ".small." not in name}, states(alone))
    alone = task(autoencoder=small)
    alone.network["sae"].load_state_dict(first)
    fit(alone, data(folders), tmp_path / "small", 7)
    assert_equal(dict(together.network["small"].state_dict()), dict(alone.network["sae"].state_dict()))


def test_what_is_measured_is_measured_over_all_tokens(folders: list[Path], tmp_path: Path) -> None:
    trained, of = task(), data(folders)
    trainer = fit(trained, of, tmp_path, 20)
    found = trainer.validate(trained, of, verbose=False)[0]
    x = torch.cat([x for x, _ in of.val_dataloader()])
    with torch.no_grad():
        x_hat, z = trained.autoencoders["sae"](x)
    error, around = (x - x_hat).double().square().sum(), (x - x.mean(dim=0)).double().square().sum()
    assert found["val/explained_variance"] == pytest.approx(float(1 - error / around), abs=1e-5)
    assert found["val/reconstruction"] == pytest.approx(float(error / x.double().square().sum()), rel=1e-5)
    assert found["val/active"] == pytest.approx(float((z > 0).sum() / len(x)))
    share = (z > 0).double().mean(dim=0)
    assert found["val/dead"] == pytest.approx(float((share == 0).double().mean()))
    assert found["val/dense"] == pytest.approx(float((share > 0.1).double().mean()))
    assert 0 < found["val/explained_variance"] < 1


def test_tensorboard_gets_how_often_each_latent_fires(
    folders: list[Path], tensorboard: TensorBoardLogger, make_trainer: MakeTrainer
) -> None:
    trained, of = task(others={"small": AutoencoderConfig("topk", 64, {"active": 1})}), data(folders)
    trainer = make_trainer(max_steps=4, val_check_interval=2, num_sanity_val_steps=1, logger=tensorboard)
    trainer.fit(trained, of)
    events = read_events(tensorboard)
    assert set(events.Tags()["histograms"]) == {"val/log10_density", "val/small/log10_density"}
    x = torch.cat([x for x, _ in of.val_dataloader()])
    for name, tag in (("sae", "val/log10_density"), ("small", "val/small/log10_density")):
        found = events.Histograms(tag)
        assert [event.step for event in found] == [2, 4]
        with torch.no_grad():
            share = (trained.autoencoders[name].encode(x) > 0).double().mean(dim=0)
        histogram = found[-1].histogram_value
        assert histogram.num == len(share)
        edges = zip([-torch.inf, *histogram.bucket_limit], histogram.bucket_limit, histogram.bucket, strict=False)
        num_dead = sum(count for low, high, count in edges if high <= -6.75)
        assert num_dead == int((share == 0).sum())
        assert histogram.sum == pytest.approx(float(torch.where(share > 0, share.log10(), -7.0).sum()))
    assert (share == 0).any()


def test_a_transcoder_learns_from_pairs(folders: list[Path], tmp_path: Path) -> None:
    pairs = data(folders, target=str(folders[1]))
    fast = partial(torch.optim.Adam, lr=1e-2)
    trained = task(autoencoder=AutoencoderConfig("transcoder", 48, {"active": 8}), optimizer=fast)
    trainer = fit(trained, pairs, tmp_path, 150)
    assert isinstance(trained.autoencoders["sae"], Transcoder)
    assert trainer.validate(trained, pairs, verbose=False)[0]["val/explained_variance"] > 0.1


def test_a_checkpoint_gives_the_same_autoencoders_back(folders: list[Path], tmp_path: Path) -> None:
    trained = task(others={"control": AutoencoderConfig("standard", 8)})
    fit(trained, data(folders), tmp_path, 3)
    again, _ = load_checkpoint(tmp_path / "step=3.ckpt")
    assert isinstance(again, SparseAutoencoderTask)
    assert_equal(states(again), states(trained))
    assert again.hparams == trained.hparams


def test_an_autoencoder_of_a_run_is_read_with_its_scales_folded_in(folders: list[Path], tmp_path: Path) -> None:
    trained = task(others={"control": AutoencoderConfig("standard", 8)})
    fit(trained, data(folders), tmp_path, 3)
    x = next(iter(data(folders).val_dataloader()))[0]
    for name in ("sae", "control"):
        sae = load_autoencoder(tmp_path / "step=3.ckpt", name)
        assert sae.input_scale == 1 != trained.autoencoders[name].input_scale
        with torch.no_grad():
            assert torch.allclose(sae(x)[0], trained.autoencoders[name](x)[0], atol=1e-5)
    with pytest.raises(UserError, match=r"autoencoder \('other'\) must be one of sae, control"):
        load_autoencoder(tmp_path / "step=3.ckpt", "other")
    with pytest.raises(UserError, match="has no ONNX file"):
        trained.exportable(RunData(lambda: data(folders)), 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoencoderConfig(k=0), r"k \(0\) must be >= 1"),
        (lambda: task(autoencoder=AutoencoderConfig("top", 8)), r"SAE architecture \('top'\) must be 'standard'"),
        (lambda: task(autoencoder=AutoencoderConfig("topk", 8, {"actve": 3})), r"did you mean active\?"),
        (lambda: task(others={"sae": CONFIG}), r"names of others \(sae\) must be Python names"),
        (lambda: task(others={"a b": CONFIG}), r"names of others \(a b\)"),
        (
            lambda: task(autoencoder=AutoencoderConfig("topk", 48, {"d_out": 5})),
            r"d_out in the settings \(5\) must be left out: it is num_outputs \(32\)",
        ),
        (lambda: task(num_outputs=5), r"num_outputs \(5\) must equal num_features \(32\), except for a transcoder"),
        (lambda: SparseAutoencoderTask(None), r"num_features \(None\) must be an int"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_transcoder_learns_to_write_a_target_of_the_same_width(folders: list[Path]) -> None:
    with pytest.raises(DataError, match=r"architecture of sae \(topk\) must be transcoder: the data have a target"):
        task().check_data(data(folders, target=str(folders[1])))
    task(autoencoder=AutoencoderConfig("transcoder", 48)).check_data(data(folders, target=str(folders[1])))


def test_data_of_another_width_are_refused(folders: list[Path]) -> None:
    with pytest.raises(DataError, match=r"num_features of the data \(32\) must equal the task's \(8\)"):
        task(8).check_data(data(folders))
