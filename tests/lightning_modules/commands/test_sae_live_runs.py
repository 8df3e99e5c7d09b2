"""`trix sae` and `trix inspect --sae` of runs that learned straight from a model, and of runs whose dump or model was moved."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import torch
from small_dumps import contents
from small_runs import save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.commands.sae_controls import trained_controls, training_of
from lightning_modules.commands.sae_run import Places, open_run
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_autoencoder
from trix.nn import FFNConfig
from trix.superposition.evaluation.reconstruction import ReconstructionMetric

SAE_YAML = """\
model:
  class_path: SparseAutoencoderTask
  init_args:
    autoencoder: {architecture: topk, k: 48, settings: {active: 4}}
    others: {small: {architecture: topk, k: 16, settings: {active: 2}}}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-2}}
data: {class_path: DATA}
trainer:
  accelerator: cpu
  max_steps: 12
  check_val_every_n_epoch: null
  val_check_interval: 12
  num_sanity_val_steps: 0
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: runs, name: NAME}}
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: best, monitor: val/explained_variance, mode: max}
"""
LIVE = (
    "ModelActivationDataModule, init_args: {model: model.ckpt, site: resid_pre.1, num_tokens: 8000, text_batch: 8, "
    "buffer_tokens: 1000, batch_size: 400, validation_fraction: 0.2}"
)
DUMP = "ActivationDataModule, init_args: {path: acts/resid_pre.1, batch_size: 400, validation_fraction: 0.2}"


def words(num_lines: int = 500) -> str:
    draw = np.random.default_rng(0)
    known = ["".join(draw.choice(list("abcdefiou"), size=size)) for size in draw.integers(2, 6, size=40)]
    return "\n".join(" ".join(draw.choice(known, size=5)).capitalize() for _ in range(num_lines))


def fit(data: str, name: str, *options: str) -> int:
    Path(f"{name}.yaml").write_text(SAE_YAML.replace("DATA", data).replace("NAME", name))
    return main(["fit", "--config", f"{name}.yaml", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a run that learned straight from it, a dump, and a run that learned from that."""
    folder, before = tmp_path_factory.mktemp("live"), Path.cwd()
    os.chdir(folder)
    try:
        Path("text.txt").write_text(words())
        data = TextDataModule(path="text.txt", context_length=32, batch_size=16, batches_per_epoch=40)
        torch.manual_seed(0)
        network = small_network(context_length=32, ffn=FFNConfig(num_tiles=4, route_on="hidden"))
        save_checkpoint(LanguageModelTask(data.vocabulary, network), data, folder / "model.ckpt")
        assert main(["dump", "model.ckpt", "--site", "resid_pre.1", "--num-tokens", "8000", "--output", "acts"]) == 0
        assert fit(LIVE, "live") == 0
        assert fit(DUMP, "dumped") == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, which is the working folder; a folder for temporary files, which must be empty in the end."""
    shutil.copytree(made, tmp_path / "runs")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def evaluated(run: str, *options: str, model: str = "model.ckpt") -> dict[str, Any]:
    arguments = ["--no-controls", "--num-tokens", "512", "--output", "figures"]
    assert main(["sae", "eval", run, "--model", model, *arguments, *options]) == 0
    figures: dict[str, Any] = json.loads(Path("figures/eval.json").read_text())
    return figures


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails and writes nothing."""
    before = contents(Path.cwd())
    capsys.readouterr()
    assert main(list(arguments)) == 2
    assert contents(Path.cwd()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_judged_is_what_training_held_out(runs: Path) -> None:
    figures, run = evaluated("runs/live"), open_run("runs/live", "eval")
    metric = ReconstructionMetric(16, 48)
    sae = load_autoencoder("runs/live")
    for x_ND, target_NO in run.data.val_dataloader():
        metric.update(*(sae(x_ND)[0], target_NO, sae(x_ND)[1]))
    assert figures["held_out_tokens"] == int(metric.num_tokens) > 1000
    expected = float(metric.compute()["explained_variance"])
    assert figures["autoencoders"]["run"]["core"]["explained_variance"] == pytest.approx(expected, abs=1e-6)
    assert figures["dump"] is None
    assert figures["model_sha256"] == figures["model_digest"] == run.identity.model
    assert figures["tokens_read"] > figures["held_out_tokens"]
    assert figures["autoencoders"]["run"]["model"]["num_tokens"] > 0
    assert list((runs.parent / "temporary").iterdir()) == []


def test_a_control_is_to_the_bit_what_fit_would_train(runs: Path, tmp_path: Path) -> None:
    (runs / "model.ckpt").rename(runs / "moved.ckpt")
    training = training_of(open_run("runs/live", "eval", places=Places(model="moved.ckpt")))
    control = trained_controls(training, tmp_path / "controls", lambda batches, *_: batches, print, ["frozen_decoder"])
    moved = LIVE.replace("model.ckpt", "moved.ckpt")
    assert fit(moved, "frozen", "--model.autoencoder.restraint", "frozen_decoder") == 0
    fitted = load_autoencoder(next(Path("runs/frozen").rglob("last.ckpt")))
    for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(fitted, weight), getattr(control["frozen_decoder"], weight)), weight


@pytest.mark.parametrize("run", ["live", "dumped"])
def test_pages_and_tiles_of_one_of_several_autoencoders(run: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def commands(*options: str) -> Iterator[list[str]]:
        model = ["--model", "model.ckpt"]
        yield ["sae", "dashboard", f"runs/{run}", *model, "--num-latents", "8", "--output", "page.html", *options]
        yield ["sae", "tiles", f"runs/{run}", *model, "--output", "tiles", *options]
        yield ["inspect", "model.ckpt", "--sae", f"runs/{run}", "--output", "cards.html", *options]

    latents = {}
    for options, name in (((), "sae"), (("--autoencoder", "small"), "small")):
        for command in commands(*options):
            assert main(command) == 0, command
        record = json.loads(Path("tiles/tiles.json").read_text())
        latents[name] = record["tiles"]
        assert record["provenance"]["autoencoder"] == name
        assert f"{name} of runs/{run}" in Path("page.html").read_text()
        assert f"{name} of runs/{run}" in Path("tiles/tiles.html").read_text()
        assert f"latents of resid_pre.1 of the autoencoder {name} that go with it" in Path("cards.html").read_text()
    assert latents["sae"] != latents["small"]
    for command in commands("--autoencoder", "large"):
        assert "--autoencoder (large) must be one of sae, small" in refused(capsys, *command)
    assert list((runs.parent / "temporary").iterdir()) == []


def test_options_of_an_autoencoder_need_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("autoencoder", "dump"):
        assert f"--{name} (x) must come with --sae RUN" in refused(capsys, "inspect", "model.ckpt", f"--{name}", "x")


def test_a_dump_that_was_moved_is_found_by_its_option(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluated("runs/dumped")
    Path("elsewhere").mkdir()
    Path("acts/resid_pre.1").rename("elsewhere/x")
    ours = ["sae", "eval", "runs/dumped", "--model", "model.ckpt"]
    ckpt = "runs/dumped/version_0/checkpoints/best.ckpt"
    assert f"dump acts/resid_pre.1, which {ckpt} learned from, is not there: --dump DIR" in refused(capsys, *ours)
    after = evaluated("runs/dumped", "--dump", "elsewhere/x")
    assert after["autoencoders"] == before["autoencoders"]
    assert after["dump"] == "elsewhere/x"
    training = training_of(open_run("runs/dumped", "eval", places=Places(dump="elsewhere/x")))
    assert len(trained_controls(training, tmp_path / "controls", lambda batches, *_: batches, print, ["frozen_encoder"])) == 1
    assert main(["inspect", "model.ckpt", "--sae", "runs/dumped", "--dump", "elsewhere/x", "--output", "cards.html"]) == 0
    ours += ["--dump", "elsewhere/x", "--target", "acts"]
    assert f"--target (acts) must be left out: {ckpt} learned from no such dump" in refused(capsys, *ours)
    live = ["sae", "eval", "runs/live", "--model", "model.ckpt", "--dump", "elsewhere/x"]
    assert "--dump (elsewhere/x) must be left out: runs/live" in refused(capsys, *live)
    resume = ["fit", "--resume", "runs/dumped", "--trainer.max_steps", "14"]
    assert "dump acts/resid_pre.1 must exist: --data.path DIR says where it is" in refused(capsys, *resume)
    assert main([*resume, "--data.path", "elsewhere/x"]) == 0


def test_another_dump_in_its_place_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "model.ckpt", "--site", "resid_pre.1", "--num-tokens", "4000", "--output", "other"]) == 0
    error = refused(capsys, "sae", "eval", "runs/dumped", "--model", "model.ckpt", "--dump", "other/resid_pre.1")
    assert "other/resid_pre.1: digest of the dump (" in error
    assert "must be that of the dump on which runs/dumped" in error


def test_a_model_that_was_moved_is_named_by_its_option(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluated("runs/live")
    Path("model.ckpt").rename("moved.ckpt")
    assert evaluated("runs/live", model="moved.ckpt")["autoencoders"] == before["autoencoders"]
    resume = ["fit", "--resume", "runs/live", "--trainer.max_steps", "14"]
    assert "model model.ckpt must exist: --data.model MODEL says where it is" in refused(capsys, *resume)
    assert main([*resume, "--data.model", "moved.ckpt"]) == 0


def test_another_model_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = TextDataModule(path="text.txt", context_length=32, batch_size=16)
    torch.manual_seed(1)
    save_checkpoint(LanguageModelTask(data.vocabulary, small_network(context_length=32)), data, runs / "other.ckpt")
    error = refused(capsys, "sae", "eval", "runs/live", "--model", "other.ckpt")
    assert "other.ckpt: digest of the model (" in error
    assert "must be that of the model on which runs/live" in error


@pytest.mark.parametrize("run", ["live", "dumped"])
def test_a_run_that_held_out_chunks_of_tokens_is_refused(run: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path("runs", run).rglob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["settings"]["split"]
        torch.save(checkpoint, path)
    line = "split of the run's data (chunks of tokens) must be documents: what is held out now is not what was held out when"
    assert line in refused(capsys, "sae", "eval", f"runs/{run}", "--model", "model.ckpt")
    assert line in refused(capsys, "fit", "--resume", f"runs/{run}", "--trainer.max_steps", "14")
