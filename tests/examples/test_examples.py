"""The examples run one after the other, on a small model, and say what they found."""

import html
import runpy
import sys
from pathlib import Path

import pytest
import torch
from small_runs import save_checkpoint

from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig, LanguageModelConfig
from trix.superposition import sae
from trix.superposition.merge import load_merged_sae

EXAMPLES = Path(__file__).parents[2] / "examples"
SECTIONS = ("Trained", "Explained", "Latent", "Steered", "Edited", "Exported")
SCRIPTS = sorted(EXAMPLES.glob("0*.py"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that knows the characters of the texts."""
    torch.manual_seed(0)
    data = TextDataModule(context_length=64)
    tiles = FFNConfig(num_tiles=4, route_on="context")
    network = LanguageModelConfig(d_model=16, num_layers=3, n_heads=2, context_length=128, ffn=tiles)
    return save_checkpoint(LanguageModelTask(data.vocabulary, network), data, tmp_path_factory.mktemp("model") / "model.ckpt")


def run(script: Path, *arguments: str) -> None:
    before = sys.path.copy(), sys.argv.copy()
    try:
        sys.path.insert(0, str(EXAMPLES))
        sys.argv = [script.name, *arguments]
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = before
        sys.modules.pop("shared", None)


def test_they_are_the_six_of_the_interface() -> None:
    names = ("dump_activations", "train_sae", "analyze_latents", "merge_and_refit", "plot_maps", "steer_generation")
    assert [script.stem for script in SCRIPTS] == [f"{number:02}_{name}" for number, name in enumerate(names, start=1)]


def test_they_run_in_order(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for script in SCRIPTS:
        run(script, "--model", str(checkpoint), "--folder", str(tmp_path / "out"))
        said[script.stem[3:]] = capsys.readouterr().out
    assert "texts of the classes files, numbers" in said["dump_activations"]
    assert "at a false discovery rate of 5 %, 0 where topics are shuffled" in said["analyze_latents"]
    assert said["steer_generation"].startswith("as it is:           'The function returns ")
    base = sae.load_sae(tmp_path / "out" / "sae")
    assert load_merged_sae(tmp_path / "out" / "merged.safetensors", base).k == base.k // 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"documents.png", "latents.png", "tokens.png", "latent.html", "latent_summary.csv"}


def test_the_walk_through_ends_with_a_model_that_was_edited_by_what_a_latent_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(EXAMPLES / "walk_through.py", "--model", str(checkpoint), "--folder", str(tmp_path))
    page = html.unescape((tmp_path / "walk_through.html").read_text())
    assert [part.split("<")[0].split()[0] for part in page.split("<h2>")[1:]] == list(SECTIONS)
    assert "routed the same 100.00%" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(tmp_path / "walk_through.html"))


def test_without_a_model_they_say_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(SCRIPTS[0], "--model", str(tmp_path / "none"), "--folder", str(tmp_path))
    assert "none is missing: `make demo` trains one" in capsys.readouterr().err
