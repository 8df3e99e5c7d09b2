"""``trix inspect``: a page from a checkpoint alone, or one line."""

import re
from pathlib import Path

import pytest
import torch
from small_runs import SENTENCE

from lightning_modules.cli import main


@pytest.mark.usefixtures("drawn_figures")
def test_a_language_model_is_shown_on_its_own_validation_text(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "page.html"
    assert main(["inspect", str(checkpoints / "lm.ckpt"), "--output", str(output), "--num-tokens", "50"]) == 0
    out, err = capsys.readouterr()
    assert out == f"wrote   {output}  (open it in a browser)\n"
    assert err == ""
    page = output.read_text()
    assert "48 tokens, in sequences of 8" in page
    assert f"validation text of {checkpoints / 'text.txt'}" in page
    assert page.count('<div class="tile">') == 2 * 4
    text = SENTENCE * 2
    for before, marked, after in re.findall(r'<div class="context">(.*?)<mark>(.*?)</mark>(.*?)</div>', page):
        shown = before.lstrip() + marked + after
        assert shown.replace("␣", " ").replace("⏎", "\n").strip() in text
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


@pytest.mark.usefixtures("drawn_figures")
def test_a_classifier_is_shown_with_its_classes_beside_its_checkpoint(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoints / "digits.ckpt")]) == 0
    page = (checkpoints / "digits.html").read_text()
    assert "Class by tile" in page
    assert "2,872 tokens, in sequences of 8" in page
    assert 'class="picture"' in page
    assert "purity: " in page


def test_at_least_one_sequence_is_shown(checkpoints: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert main(["inspect", str(checkpoints / "lm.ckpt"), "--output", str(output), "--num-tokens", "1"]) == 0
    assert ">8 tokens, in sequences of 8<" in output.read_text()


def test_a_linked_output_stays_a_link(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "real.html").touch()
    (tmp_path / "link.html").symlink_to("real.html")
    assert main(["inspect", str(checkpoints / "hash.ckpt"), "--output", str(tmp_path / "link.html"), "--num-tokens", "1"]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").stat().st_size > 0


def test_what_is_no_checkpoint_of_a_routed_model_leaves_nothing(
    no_checkpoint: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, message = no_checkpoint
    assert main(["inspect", path, "--output", str(tmp_path / "new" / "page.html")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    ([], "the following arguments are required: MODEL"),
    (["{ckpt}", "--num-tokens", "0"], "--num-tokens (0) must be >= 1"),
    (["{ckpt}", "--outptu", "x"], "unknown option --outptu of `trix inspect`; did you mean --output?"),
    (["{ckpt}", "--output", "{out}"], "must be a file, not a directory"),
    (["{ckpt}", "--output", "/dev/null"], "must be a file, not a device"),
    (["{ckpt}", "--output", "{ckpt}"], "must be another file than the checkpoint"),
    (["{ckpt}", "--output", "{digits}"], "digits.ckpt must not exist yet: no .ckpt file is replaced"),
    (["{ckpt}", "--output", "/proc/new/a.html"], "output /proc/new/a.html cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line(
    arguments: list[str], message: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(ckpt=checkpoints / "lm.ckpt", digits=checkpoints / "digits.ckpt", out=tmp_path) for text in arguments]
    assert main(["inspect", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_no_more_is_told(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(checkpoints / "lm.ckpt", weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["path"] = str(tmp_path / "gone.txt")
    torch.save(checkpoint, tmp_path / "lm.ckpt")
    assert main(["inspect", str(tmp_path / "lm.ckpt")]) == 2
    assert "gone.txt cannot be read: No such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lm.ckpt"]


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_inspect(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", option]) == 0
    assert capsys.readouterr().out.startswith("usage: trix inspect ")
