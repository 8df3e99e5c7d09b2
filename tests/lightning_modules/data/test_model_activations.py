"""Activations straight from a model: the rows of a dump, in an order that a seed decides, from any place on."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted_backend import PlantedWithSinks
from small_dumps import ragged_frame, trix_backend
from small_runs import save_language_model
from torch import Tensor

from lightning_modules.cli import main
from lightning_modules.data.model_activations import ModelActivationDataModule
from lightning_modules.errors import DataError, UserError
from lightning_modules.tasks import load_autoencoder
from trix.superposition import DumpConfig
from trix.superposition.backends import CausalLMBackend, Site
from trix.superposition.dump import ActivationDump, dump_sites, stream_shards
from trix.superposition.dump.live import LiveActivations
from trix.superposition.dump.texts import TokenizedTexts

SITE = Site(1, "resid_pre")


def live(backend: CausalLMBackend, **settings: Any) -> LiveActivations:
    texts = TokenizedTexts.from_frame(ragged_frame(), "title", "topic", backend, 40)
    return LiveActivations(backend, texts, SITE, **{"text_batch": 8, "buffer_tokens": 500, "held_out": 0.25, **settings})


def rows(parts: Iterable[Tensor]) -> list[list[float]]:
    return sorted(torch.cat(list(parts)).tolist())


@pytest.mark.parametrize("backend", [trix_backend(), PlantedWithSinks()], ids=["trix", "sinks"])
def test_the_rows_are_those_of_a_dump_each_in_one_part(backend: CausalLMBackend, tmp_path: Path) -> None:
    config = DumpConfig(max_len=40, batch_size=8)
    folder = dump_sites(ragged_frame(), "title", "topic", backend, config, [SITE], tmp_path)[SITE]
    dump = ActivationDump(folder)
    data = live(backend)
    validation = list(data.in_order(100))
    assert all(len(part) == 100 for part in validation[:-1])
    num_training = len(dump) - sum(map(len, validation))
    training = list(islice(data.shuffled(1, 0, 0), num_training))
    assert rows([*training, *validation]) == rows(stream_shards(dump.paths))
    assert num_training + dump.manifest.dropped.norm >= data.num_tokens["training"] >= num_training
    second_pass = list(islice(data.shuffled(1, 0, 0), num_training, 2 * num_training))
    assert rows(second_pass) == rows(training)
    assert not torch.equal(torch.cat(second_pass), torch.cat(training))


def test_any_batch_can_be_asked_for_alone() -> None:
    data = live(trix_backend())
    whole = list(islice(data.shuffled(64, 3, 1), 40))
    assert data.num_tokens["training"] < 40 * 64  # into the second pass
    assert all(part.shape == (64, 32) and part.dtype == torch.float32 for part in whole)
    for start in (0, 1, 7, 31, 39):
        assert torch.equal(next(live(trix_backend()).shuffled(64, 3, 1, start)), whole[start])
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert not torch.equal(next(data.shuffled(64, **other)), whole[0])


def test_no_more_than_the_buffer_and_a_batch_of_texts_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    data, num_read = live(trix_backend()), [0]
    longest = 8 * int(data.texts.length.max())
    read = data._read

    def counted(document: NDArray[np.int64]) -> Tensor:
        rows_ND = read(document)
        num_read[0] += len(rows_ND)
        return rows_ND

    monkeypatch.setattr(data, "_read", counted)
    ahead = [num_read[0] - 10 * served for served, _ in enumerate(islice(data.shuffled(10, 0, 0), 400))]
    assert 500 <= max(ahead) < 500 + longest + 10


def test_neighbours_are_spread_over_the_buffer() -> None:
    data = live(trix_backend(), buffer_tokens=10**6)
    in_order = torch.cat([data._read(batch).clone() for batch in data._batches["training"]]).float()
    shuffled = torch.cat(list(islice(data.shuffled(1, 0, 0), len(in_order))))
    place = {tuple(row.tolist()): index for index, row in enumerate(in_order)}
    gap = torch.tensor([place[tuple(row.tolist())] for row in shuffled]).diff().abs().double().mean()
    assert gap == pytest.approx(len(in_order) / 3, rel=0.15)  # of two random places


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_batch": 0}, r"text_batch \(0\) and buffer_tokens \(500\) must be >= 1"),
        ({"held_out": 1.0}, r"held_out \(1.0\) must be > 0 and < 1"),
        ({"text_batch": 1000}, r"batches of texts for validation \(0 of 1\) must be >= 1"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        live(trix_backend(), **settings)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def fit(ckpt: Path, runs: Path, name: str, *arguments: str) -> int:
    data = {"model": ckpt, "site": "resid_pre.1", "num_tokens": 600, "text_batch": 4, "buffer_tokens": 100, "batch_size": 50}
    logger = {"save_dir": runs, "name": name}
    return main(
        [
            *("fit", "--config", "configs/sae.yaml", "--data=ModelActivationDataModule", "--model.autoencoder.k=64"),
            *(f"--data.{key}={value}" for key, value in data.items()),
            *(f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()),
            *("--trainer.val_check_interval=5", "--model.lr_scheduler=null", *arguments),
        ]
    )


def test_a_run_that_is_resumed_within_an_epoch_ends_with_the_same_weights(ckpt: Path, tmp_path: Path) -> None:
    assert fit(ckpt, tmp_path, "whole", "--trainer.max_steps=15") == 0
    assert fit(ckpt, tmp_path, "parts", "--trainer.max_steps=5") == 0
    assert main(["fit", "--resume", str(tmp_path / "parts"), "--trainer.max_steps", "15"]) == 0
    last = [sorted((tmp_path / name).rglob("last.ckpt"))[-1] for name in ("whole", "parts")]
    ours, other = (load_autoencoder(path) for path in last)
    assert len(ours.state_dict()) > 4
    for key, value in ours.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_bad_data_is_one_error(ckpt: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"site": "mlp_in.1"}, r"site \(mlp_in.1\) must be one of resid_pre, resid_mid, router_in, ffn_out"),
        ({"site": "resid_pre.9"}, r"layer \(9\) must be >= 0 and < number of layers \(2\)"),
        ({"model": str(tmp_path / "none.ckpt")}, "none.ckpt"),
        ({"text": str(tmp_path / "none.txt")}, "none.txt: No such file"),
        ({"max_len": 9}, r"--max-len \(9\) must be <= context_length \(8\)"),
        ({"batch_size": 10**6}, r"batch_size \(1000000\) must be <= training tokens"),
        ({"buffer_tokens": 0}, r"buffer_tokens \(0\) must be >= 1"),
    ):
        with pytest.raises((DataError, UserError), match=message):
            ModelActivationDataModule(
                **{"model": str(ckpt), "site": "resid_pre.1", "num_tokens": 600, "text_batch": 4, **settings}
            )
