"""``trix why``: what it says is what the introspector says; a mistake gives one line."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from gone_reader import run_without_reader
from small_runs import save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_checkpoint
from trix.introspection import TriXIntrospector
from trix.nn import FFNConfig


def rows(printed: str) -> list[list[str]]:
    """The cells of the lines between the header of the table and its legend."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["at", "token"])
    end = next(index for index, line in enumerate(lines) if line.startswith("tile  "))
    return [line.split() for line in lines[start + 1 : end] if line]


def test_a_text_is_explained_token_by_token(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = checkpoints / "lm.ckpt"
    assert main(["why", str(ckpt), "--prompt", "brown", "--layer", "1", "--num-dims", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("prompt, layer 1 (there are 0 to 1; --layer chooses), 4 tiles\n")
    assert "\x1b" not in out  # plain where it is piped
    task, _ = load_checkpoint(ckpt)
    tokens = torch.tensor([[task.vocabulary.index(character) for character in "brown"]])
    for cells, expected in zip(rows(out), TriXIntrospector(task.network).why(tokens, 1, 3), strict=True):
        position, token, tile, score, runner_up, runner_up_score, bias, *decided = cells
        assert (int(position), token) == (expected.token_idx, repr("brown"[expected.token_idx]))
        assert (int(tile), int(runner_up)) == (expected.tile_idx, expected.runner_up_idx)
        assert float(score) == pytest.approx(expected.score, abs=0.006)
        assert float(runner_up_score) == pytest.approx(expected.runner_up_score, abs=0.006)
        assert float(bias) == pytest.approx(expected.bias - expected.runner_up_bias, abs=0.006)
        assert [int(pair.split(":")[0]) for pair in decided] == expected.decisive_dims


@pytest.mark.parametrize(
    ("options", "positions"),
    [([], [0, 1, 2, 3]), (["--position", "2"], [2]), (["--last", "3"], [1, 2, 3]), (["--last", "9"], [0, 1, 2, 3])],
)
def test_tokens_can_be_chosen(
    options: list[str], positions: list[int], checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["why", str(checkpoints / "lm.ckpt"), "--prompt", "dogs", *options]) == 0
    assert [int(cells[0]) for cells in rows(capsys.readouterr().out)] == positions


def test_markup_and_white_space_in_a_text_are_shown_as_they_are(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(checkpoints / "lm.ckpt"), "--prompt", " \n;"]) == 0
    out = capsys.readouterr().out
    for token in ("' '", r"'\n'", "';'"):
        assert token in out


def test_all_tiles_of_a_token_are_named_and_the_runner_up_is_none_of_them(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    L.seed_everything(0)
    text = TextDataModule(path=checkpoints / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    network = small_network(ffn=FFNConfig(num_tiles=4, top_k=2))
    ckpt = save_checkpoint(LanguageModelTask(text.vocabulary, network), text, tmp_path / "two.ckpt")
    assert main(["why", str(ckpt), "--prompt", "dog"]) == 0
    printed = rows(capsys.readouterr().out)
    task, _ = load_checkpoint(ckpt)
    tokens = torch.tensor([[task.vocabulary.index(character) for character in "dog"]])
    decision = TriXIntrospector(task.network).decision(tokens)
    for cells, tiles in zip(printed, decision.tile_idx.tolist(), strict=True):
        assert [int(cell) for cell in cells[2:4]] == tiles
        assert int(cells[5]) not in tiles


def test_an_image_is_explained_row_by_row(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(checkpoints / "digits.ckpt"), "--index", "358"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("image 358: a ")
    assert len(out.splitlines()) == 2 + 8 + 1 + 5
    assert "#" in out


@pytest.mark.parametrize("prompt", ["be\u0301 z", "  be\u0301  <b>%(name)s</b> z\n"])
def test_a_text_to_classify_is_taken_as_the_data_has_it(
    prompt: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["why", str(checkpoints / "texts.ckpt"), "--prompt", prompt]) == 0
    out = capsys.readouterr().out
    assert out.startswith("prompt, taken for '")
    task, _ = load_checkpoint(checkpoints / "texts.ckpt")
    tokens = torch.tensor([[4, 6, 2, 1]])  # z is unknown
    expected = TriXIntrospector(task.network).why(tokens)
    printed = [line.split(maxsplit=1)[1] for line in out.splitlines()[2:6]]
    for line, token, e in zip(printed, ("'b'", "'é'", "' '", "'z'"), expected, strict=True):
        assert line.startswith(token)
        assert line.removeprefix(token).split()[:2] == [str(e.tile_idx), f"{e.score:.2f}"]


def test_help_says_what_the_options_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "for a model of text: the text to ask about" in out
    assert "for a classifier of images: which of its validation images" in out


def test_a_reader_that_has_gone_is_no_error(checkpoints: Path) -> None:
    code = "import sys; from lightning_modules.cli import main; sys.exit(main(sys.argv[1:]))"
    assert run_without_reader(code, ["why", str(checkpoints / "lm.ckpt"), "--prompt", "brown"]) == (0, "")


MISTAKES = [
    ([], "the following arguments are required: CKPT"),
    (["{lm}"], "a language model needs a text: --prompt TEXT"),
    (["{lm}", "--index", "1"], "a language model needs a text: --prompt TEXT"),
    (["{lm}", "--prompt", "a", "--index", "1"], "--prompt and --index cannot both be given"),
    (["{lm}", "--prompt", ""], "length of the prompt (0) must be >= 1 and <= context_length (8)"),
    (["{lm}", "--prompt", "a日本"], "the prompt holds '日', '本', outside the vocabulary of the model"),
    (["{lm}", "--prompt", "lazy brown"], "length of the prompt (10) must be >= 1 and <= context_length (8)"),
    (["{lm}", "--prompt", "a", "--layer", "2"], "layer (2) must be >= 0 and < number of routed layers (2)"),
    (["{lm}", "--prompt", "a", "--layer", "-1"], "layer (-1) must be >= 0 and < number of routed layers (2)"),
    (["{lm}", "--prompt", "a", "--num-dims", "0"], "--num-dims (0) must be >= 1"),
    (["{lm}", "--prompt", "a", "--last", "0"], "--last (0) must be >= 1"),
    (["{lm}", "--prompt", "a", "--position", "1"], "--position (1) must be >= 0 and < tokens (1)"),
    (["{lm}", "--prompt", "a", "--position", "0", "--last", "1"], "--position and --last cannot both be given"),
    (["model.onnx", "--prompt", "a"], "`trix why` reads checkpoints: give the .ckpt file that the ONNX file was exported from"),
    (["{lm}", "--promt", "a"], "unknown option --promt of `trix why`; did you mean --prompt?"),
    (["{hash}", "--prompt", "a"], "layer (0) is routed by a HashRouter, which has no directions"),
    (["{texts}"], "a classifier of texts needs one: --prompt TEXT"),
    (["{texts}", "--prompt", " <b>"], "length of the prompt (0) must be >= 1 and <= context_length (8)"),
    (["{digits}", "--prompt", "a"], "a classifier needs one of its validation images: --index N"),
    (["{digits}", "--index", "359"], "--index (359) must be >= 0 and < validation images (359)"),
    (["{digits}", "--index", "-1"], "--index (-1) must be >= 0 and < validation images (359)"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line(
    arguments: list[str], message: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: checkpoints / f"{name}.ckpt" for name in ("lm", "hash", "digits", "texts")}
    assert main(["why", *(text.format(**paths) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert message in err


def test_what_is_no_checkpoint_of_a_routed_model(no_checkpoint: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, message = no_checkpoint
    assert main(["why", path, "--prompt", "a"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_mistakes_and_help_are_told_without_torch() -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "for command in ('inspect', 'why'):\n"
        "    assert main([command, '--help']) == 0\n"
        "    assert main([command, '--wrong']) == 2\n"
        "    assert main([command, 'missing.onnx']) == 2\n"
        "heavy = [name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
