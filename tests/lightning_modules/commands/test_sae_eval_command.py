"""`trix sae eval`: its verdict and exit code, that controls are trained once and as a run would be, and what it refuses."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_dumps import contents
from small_runs import save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.commands.sae_controls import trained_controls, training_of
from lightning_modules.commands.sae_run import open_run
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_autoencoder
from lightning_modules.tasks.sparse_autoencoder import ActivationBatch
from trix.superposition.evaluation import verdict as verdict_module
from trix.superposition.sae import RESTRAINTS

SAE_YAML = """\
model:
  class_path: SparseAutoencoderTask
  init_args:
    autoencoder: {architecture: topk, k: 48, settings: {active: 4}}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-2}}
data: {class_path: ActivationDataModule, init_args: {path: acts/resid_pre.1, batch_size: 400, validation_fraction: 0.2}}
trainer:
  accelerator: cpu
  max_steps: 25
  check_val_every_n_epoch: null
  val_check_interval: 25
  num_sanity_val_steps: 0
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: runs, name: sae}}
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: "{step}", every_n_train_steps: 10, save_top_k: -1}
"""


def play(num_lines: int = 500) -> str:
    """Speakers and what they say, in words drawn at random."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefiou"), size=size)) for size in draw.integers(2, 6, size=40)]
    lines = []
    for _ in range(num_lines // 2):
        lines += ["", f"{draw.choice(words).upper()[:3]}:", " ".join(draw.choice(words, size=5)).capitalize()]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: a model, dumps of two sites, an autoencoder, and one whose decoder is frozen."""
    folder, before = tmp_path_factory.mktemp("runs"), Path.cwd()
    (folder / "text.txt").write_text(play())
    (folder / "sae.yaml").write_text(SAE_YAML)
    os.chdir(folder)
    try:
        data = TextDataModule(path="text.txt", context_length=32, batch_size=16, batches_per_epoch=40)
        for seed in (0, 1):
            torch.manual_seed(seed)
            task = LanguageModelTask(data.vocabulary, small_network(context_length=32))
            save_checkpoint(task, data, folder / f"model{seed}.ckpt")
        sites = ["resid_pre.1", "router_in.0"]
        assert main(["dump", "model0.ckpt", "--site", *sites, "--num-tokens", "8000", "--output", "acts"]) == 0
        assert main(["fit", "--config", "sae.yaml"]) == 0
        frozen = ["--model.autoencoder.restraint", "frozen_decoder", "--trainer.logger.name", "frozen"]
        assert main(["fit", "--config", "sae.yaml", *frozen]) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def in_folder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def evaluate(run: str = "runs/sae", *options: str, model: str = "model0.ckpt") -> int:
    return main(["sae", "eval", run, "--model", model, "--num-tokens", "512", *options])


def test_a_frozen_decoder_is_no_better_than_its_control(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("runs/frozen") == 3
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("no better than its control: explained variance 0.")
    folder = runs / "runs/frozen/version_0"
    figures = json.loads((folder / "eval" / "eval.json").read_text())
    assert figures["verdict"]["is_better"] is False
    assert f"the same training with another seed: {figures['verdict_of_other_seed']['text']}" in out
    other = figures["verdict_of_other_seed"]["explained_variance"]
    assert other["of_control"] == figures["verdict"]["explained_variance"]["of_control"]
    assert other["ours"] == pytest.approx(figures["autoencoders"]["other_seed"]["core"]["explained_variance"])
    seen = figures["held_out_runs_seen"]
    assert (f"{seen:.1%} of the held-out runs of 32 tokens also stand in training documents" in out) == (seen > 0)
    names = ["run", *RESTRAINTS, "other_seed"]
    assert list(figures["autoencoders"]) == names
    own, control = (figures["autoencoders"][name] for name in ("run", "frozen_decoder"))
    assert own == control  # trained as the run was, it is the run
    assert own["core"]["explained_variance"] != figures["autoencoders"]["other_seed"]["core"]["explained_variance"]
    assert figures["autoencoders"]["run"]["model"]["num_tokens"] == 512 - 512 // 32


def test_controls_are_trained_once_each_and_give_the_same_figures_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate()
    first, figures = capsys.readouterr().out, json.loads((runs / "runs/sae/version_0/eval/eval.json").read_text())
    assert re.findall(r"^trained (\w+): 25 steps", first, re.MULTILINE) == [*RESTRAINTS, "other_seed"]
    kept = contents(runs / "runs/sae/version_0/controls")
    for control, name in (("frozen_encoder", "cfg.json"), ("other_seed", "sha256.json")):  # as a kill would leave them
        next((runs / "runs/sae/version_0/controls").glob(f"{control}-*/{name}")).unlink()
    weights = next((runs / "runs/sae/version_0/controls").glob("frozen_decoder-*/sae_weights.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # still a finite number
    weights.write_bytes(content)
    evaluate("runs/sae", "--output", "elsewhere")
    second = capsys.readouterr().out
    assert re.findall(r"^trained (\w+)", second, re.MULTILINE) == ["frozen_decoder", "frozen_encoder", "other_seed"]
    assert contents(runs / "runs/sae/version_0/controls") == kept
    again = json.loads((runs / "elsewhere/eval.json").read_text())
    for name in ("autoencoders", "dense_probes", "stability", "verdict"):
        assert again[name] == figures[name]


@pytest.mark.parametrize("name", ["step=10.ckpt", "last.ckpt"])
def test_a_control_is_to_the_bit_what_fit_would_train(name: str, runs: Path, tmp_path: Path) -> None:
    """Also where the checkpoint is of the middle of a training, whose schedule goes on."""
    ours = open_run(str(runs / "runs/sae/version_0/checkpoints" / name), "eval")
    training = training_of(ours)
    seen: list[tuple[int, str]] = []

    def track(batches: Iterator[ActivationBatch], num_steps: int, control: str) -> Iterator[ActivationBatch]:
        seen.append((num_steps, control))
        return batches

    said: list[str] = []
    control = trained_controls(training, tmp_path, track, said.append, ["frozen_decoder"])["frozen_decoder"]
    fitted = load_autoencoder(runs / "runs/frozen/version_0/checkpoints" / name)
    for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(fitted, weight), getattr(control, weight)), weight
    assert seen == [(10 if name == "step=10.ckpt" else 25, "frozen_decoder")]
    again = trained_controls(training, tmp_path, track, said.append, ["frozen_decoder"])["frozen_decoder"]
    assert torch.equal(again.W_enc, control.W_enc)
    assert len(seen) == len(said) == 1


def test_better_than_the_margin_gives_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verdict_module, "MARGIN", -1.0)
    assert evaluate() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("better than its best control: explained variance 0.")


def test_the_page_is_one_offline_file_with_all_figures(runs: Path) -> None:
    evaluate()
    page = (runs / "runs/sae/version_0/eval/eval.html").read_text()
    figures = json.loads((runs / "runs/sae/version_0/eval/eval.json").read_text())
    assert page.count("<img ") == 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    for name, found in figures["autoencoders"].items():
        assert name.replace("_", " ") in page
        for value in found["core"].values():
            assert f"{value:.3f}" in page
    for question in figures["dense_probes"]:
        assert question in page
    assert figures["checkpoint_sha256"] in page
    assert "<dd>architecture topk, k 48, active 4</dd>" in page
    assert figures["command"] == ["trix", "sae", "eval", "runs/sae", "--model", "model0.ckpt", "--num-tokens", "512"]
    assert figures["environment"]["packages"]["torch"] == torch.__version__


def test_without_controls_nothing_is_trained_and_there_is_no_verdict(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "runs/sae", tmp_path / "sae")
    shutil.rmtree(tmp_path / "sae/version_0/controls", ignore_errors=True)
    assert evaluate(str(tmp_path / "sae"), "--no-controls") == 0
    assert "no verdict" in capsys.readouterr().out
    assert not (tmp_path / "sae/version_0/controls").exists()
    figures = json.loads((tmp_path / "sae/version_0/eval/eval.json").read_text())
    assert figures["verdict"] is None
    assert list(figures["autoencoders"]) == ["run"]


def test_texts_of_the_users_own(runs: Path, tmp_path: Path) -> None:
    (runs / "own.txt").write_text(play(40))
    assert evaluate("runs/sae", "--no-controls", "--text", "own.txt", "--output", str(tmp_path)) == 0
    own = json.loads((tmp_path / "eval.json").read_text())["autoencoders"]["run"]["model"]
    evaluate("runs/sae", "--no-controls", "--output", str(tmp_path))
    assert own != json.loads((tmp_path / "eval.json").read_text())["autoencoders"]["run"]["model"]


def test_at_another_site_the_loss_is_not_measured_and_a_line_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--data.path", "acts/router_in.0", "--trainer.logger.name", "router", "--trainer.max_steps", "3"]
    assert main(["fit", "--config", "sae.yaml", *other]) == 0
    assert evaluate("runs/router", "--no-controls") == 0
    out = capsys.readouterr().out
    assert "cross-entropy is not measured: site (router_in.0) must be resid_pre" in out
    figures = json.loads((runs / "runs/router/version_0/eval/eval.json").read_text())
    assert figures["autoencoders"]["run"]["model"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/sae", "--model", "model1.ckpt"], "model1.ckpt: digest of the model ("),
        (["runs/sae", "--model", "nowhere"], "nowhere cannot be read"),
        (["nowhere", "--model", "model0.ckpt"], "nowhere cannot be read"),
        (["model0.ckpt", "--model", "model0.ckpt"], "model0.ckpt: task ('language_model') must be sparse_autoencoder"),
        (["runs/sae", "--model", "model0.ckpt", "--num-tokens", "1"], "--num-tokens (1) must be >= 2"),
        (["runs/sae", "--model", "model0.ckpt", "--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["runs/sae", "--model", "model0.ckpt", "--output", "text.txt"], "output text.txt must be a folder"),
        (["runs/sae", "--model", "model0.ckpt", "--output", "text.txt/in"], "output text.txt/in cannot be written: Not a dir"),
        (["runs/sae", "--model", "model0.ckpt", "--controls"], "unknown option --controls of `trix sae eval`"),
        (["runs/sae"], "--model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in runs.rglob("*") if path.is_file()}
    assert main(["sae", "eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path for path in runs.rglob("*") if path.is_file()} == before


def test_runs_that_cannot_be_judged_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No dump any more; no configuration; a setting that the controls' loop lacks; a configuration of another autoencoder."""

    def refused(change: str, by: str, *options: str) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / "runs/sae", folder)
        shutil.rmtree(folder / "version_0/controls", ignore_errors=True)
        config = folder / "version_0/config.yaml"
        text = config.read_text()
        assert change in text
        config.write_text(text.replace(change, by, 1))
        assert evaluate(str(folder), *options) == 2
        assert not (folder / "version_0/controls").exists()
        return capsys.readouterr().err

    clipped = refused("gradient_clip_val: null", "gradient_clip_val: 1.0")
    assert "trainer.gradient_clip_val (1.0) must be None, or controls would be trained otherwise" in clipped
    assert "--no-controls" in clipped
    assert "must be the checkpoint's" in refused("k: 48", "k: 49")
    assert "standard library" in refused("class_path: torch.optim.Adam", "class_path: subprocess.Popen")
    assert "add --trust own_adam" in refused("class_path: torch.optim.Adam", "class_path: own_adam.Adam")
    manifest = runs / "acts/resid_pre.1/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"documents": ', '"documents": 9', 1))
    try:
        assert evaluate() == 2
        assert re.search(
            r"acts/resid_pre.1: digest of the dump \(\w{12}\) must be that of the dump on which", capsys.readouterr().err
        )
    finally:
        manifest.write_text(text)
    (runs / "acts").rename(runs / "gone")
    try:
        assert evaluate() == 2
        assert "acts/resid_pre.1" in capsys.readouterr().err
    finally:
        (runs / "gone").rename(runs / "acts")
    shutil.copy(next((runs / "runs/sae").rglob("*.ckpt")), tmp_path / "alone.ckpt")
    assert evaluate(str(tmp_path / "alone.ckpt")) == 2
    assert "its run has left no config.yaml, by which controls are trained: --no-controls" in capsys.readouterr().err
