"""Commands on a model that routes on context: n-grams in the place of dimensions, and a signature designed for some."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from small_runs import SENTENCE, save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_checkpoint
from trix.introspection import TriXIntrospector
from trix.introspection.ngrams import NgramReader, ngrams_at
from trix.nn import FFNConfig


@pytest.fixture(scope="module")
def context_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers of 8 tiles that read 2 characters."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=20)
    L.seed_everything(0)
    ffn = FFNConfig(num_tiles=8, route_on="context")
    task = LanguageModelTask(text.vocabulary, small_network(d_model=32, ffn=ffn))
    return save_checkpoint(task, text, folder / "context.ckpt")


def test_why_names_what_was_read_and_what_of_it_decided(context_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "fox\n"
    assert main(["why", str(context_checkpoint), "--prompt", prompt, "--layer", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1].split() == ["at", "token", "tile", "score", "runner-up", "score", "bias", "read", "decided", "by"]
    assert "decided by  token@place:how much" in out
    assert "dimension" not in out
    task, _ = load_checkpoint(context_checkpoint)
    token_BT = torch.tensor([[task.vocabulary.index(character) for character in prompt]])
    explanations = TriXIntrospector(task.network).why(token_BT, 1)
    winner_T, rival_T = (torch.tensor([getattr(e, name) for e in explanations]) for name in ("tile_idx", "runner_up_idx"))
    part_TJ = NgramReader(task.network).contributions(ngrams_at(token_BT, 2), winner_T, rival_T, 1)
    for place, (line, read) in enumerate(zip(lines[2:6], ("f", "fo", "ox", r"x\n"), strict=True)):
        before, _, decided = line.rpartition(f"  '{read}' ")
        assert before.split()[:3] == [str(place), repr(prompt[place]), str(int(winner_T[place]))]
        found = dict(re.findall(r"@(-?\d):([+-]\d\.\d\d)", decided))
        expected = {str(back): part_TJ[place, back - 1] for back in ((0,) if place == 0 else (0, -1))}
        assert found.keys() == expected.keys()
        assert all(float(found[back]) == pytest.approx(float(expected[back]), abs=0.006) for back in found)


def test_why_names_only_so_many_tokens(context_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(context_checkpoint), "--prompt", "fox", "--num-dims", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert [len(re.findall(r"@-?\d:", line)) for line in lines] == [1, 1, 1]


def test_the_page_names_tiles_by_the_ngrams_of_the_training_text(context_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert main(["inspect", str(context_checkpoint), "--output", str(output), "--num-tokens", "160"]) == 0
    page = output.read_text()
    # 20 batches of 4 windows of 8.
    assert page.count("The usage predicted from the n-grams of 640 tokens (training text) is at most") == 2
    assert page.count("points off, from those of the sample itself 0.0.") == 2
    assert page.count("<p>n-grams: ") == 2 * 8
    assert page.count("(predicted: ") == 2 * 8
    assert re.search(r"<code>ox</code>&nbsp;\d\.\d%", page)
