"""``trix export`` and ``trix generate``, on a small trained model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from small_runs import SENTENCE, save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds lm.ckpt and lm.onnx."""
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    L.seed_everything(0)
    save_checkpoint(LanguageModelTask(text.vocabulary, small_network()), text, folder / "lm.ckpt")
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(folder / "lm.onnx")]) == 0
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("command", ["export", "generate"])
def test_help_lists_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        assert main([command, option]) == 0
        assert capsys.readouterr().out.startswith(f"usage: trix {command} ")


def test_export_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "lm.onnx"
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(output), "--held-out-tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote   {output}\n" in printed
    assert "on 64 held-out tokens" in printed
    assert names(output.parent) == {"lm.onnx"}


def test_a_run_folder_means_its_newest_best_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (0, 1):
        (tmp_path / f"run/version_{version}/checkpoints").mkdir(parents=True)
    shutil.copy(folder / "lm.ckpt", tmp_path / "run/version_1/checkpoints/best.ckpt")
    (tmp_path / "run/version_0/checkpoints/best.ckpt").write_text("older, and no checkpoint")
    output = tmp_path / "m.onnx"
    assert main(["export", "--ckpt", str(tmp_path / "run"), "--output", str(output), "--held-out-tokens", "64"]) == 0
    assert main(["why", str(tmp_path / "run"), "--prompt", "fox"]) == 0
    surgery = ["surgery", str(tmp_path / "run"), "freeze", "--layer", "0", "--tile", "0", "--tag", "t", "--output"]
    assert main([*surgery, str(tmp_path / "new.ckpt")]) == 0
    assert main(["inspect", str(tmp_path / "run"), "--num-tokens", "32"]) == 0
    assert (tmp_path / "run/version_1/checkpoints/best.html").is_file()
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    assert main(["export", "--ckpt", str(tmp_path / "none"), "--output", str(output)]) == 2
    assert "the folder holds no checkpoint" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(folder / "lm.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("up.weight"))
    checkpoint["state_dict"][name][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    assert main(["export", "--ckpt", str(tmp_path / "nan.ckpt"), "--output", str(tmp_path / "nan.onnx")]) == 2
    err = capsys.readouterr().err
    assert f"weight {name.removeprefix('network.')} must be finite" in err
    assert names(tmp_path) == {"nan.ckpt"}


def test_export_takes_the_held_out_text_there_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(tmp_path / "a.onnx"), "--no-fallback"]) == 0
    assert "on 184 held-out tokens" in capsys.readouterr().out  # 23 windows of 8; the default asks for at most 4096
    assert (tmp_path / "a.onnx").stat().st_size < (folder / "lm.onnx").stat().st_size


def test_activations_of_8_bits_are_an_option(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(tmp_path / "a.onnx"), "--held-out-tokens", "64"]
    assert main([*command, "--activation-bits", "8", "--group-size", "0"]) == 0
    assert "8 bits  against torch: relative RMS difference" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "a.onnx"), "--prompt", "The ", "--num-tokens", "3"]) == 0
    assert "parity  with its own answers when it was written" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.onnx")]) == 0
    assert "bits 8, group size 0; against torch: relative rms difference" in (tmp_path / "a.html").read_text()
    where = ["--layer", "0", "--tile", "1", "--tag", "t", "--output", str(tmp_path / "b.onnx")]
    assert main(["surgery", str(tmp_path / "a.onnx"), "remove", *where]) == 0
    assert main([*command, "--group-size", "0"]) == 2
    assert "--group-size (0) belongs to --activation-bits 8, not 24" in capsys.readouterr().err


def test_weights_go_to_a_second_file_on_demand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ort_ops.external_weights.INLINE_BYTES", 64)
    command = ["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(tmp_path / "a.onnx"), "--held-out-tokens", "64"]
    assert main([*command, "--external-data"]) == 0
    assert re.search(
        r"data +\d+\.\d\d MB of it in a\.onnx\.[0-9a-f]{12}\.data, which belongs next to the file", capsys.readouterr().out
    )
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["generate", str(tmp_path / "a.onnx"), "--prompt", "The ", "--num-tokens", "3"]) == 0


def test_classifier_is_exported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = DigitsDataModule()
    network = ClassifierConfig(16, 1, 2, context_length=8, ffn=FFNConfig(num_tiles=4))
    task = ClassifierTask(8, digits.num_classes, digits.class_names, network)
    save_checkpoint(task, digits, tmp_path / "c.ckpt")
    assert main(["export", "--ckpt", str(tmp_path / "c.ckpt"), "--output", str(tmp_path / "c.onnx")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "c.onnx"), "--prompt", "a"]) == 2
    assert "task (classifier) must be language_model" in capsys.readouterr().err


def test_a_classifier_of_texts_is_exported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = LanguageIdDataModule(context_length=12)
    network = ClassifierConfig(16, 1, 2, context_length=12, ffn=FFNConfig(num_tiles=4))
    task = ClassifierTask(None, data.num_classes, data.class_names, network, vocabulary=data.vocabulary)
    save_checkpoint(task, data, tmp_path / "c.ckpt")
    assert main(["export", "--ckpt", str(tmp_path / "c.ckpt"), "--output", str(tmp_path / "c.onnx")]) == 0
    assert "on 4092 held-out tokens" in capsys.readouterr().out


def test_generate_needs_no_torch_and_repeats_itself(folder: Path) -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "arguments = ['generate', sys.argv[1], '--prompt', 'The ', '--num-tokens', '20', '--seed', '7', '--threads', '1']\n"
        "assert main(arguments) == 0; assert main([*arguments, '--no-library']) == 0\n"
        "heavy = [name for name in ('torch', 'lightning', 'onnx', 'trix.nn') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(folder / "lm.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    half = len(result.stdout) // 2
    assert result.stdout[:half] == result.stdout[half:]
    assert result.stdout.startswith("The ")
    assert half == len("The ") + 20 + len("\n")
    for text in (
        "tokens/s (20 tokens, native operators)",
        "(20 tokens, portable operators)",
        "float32 parameters",
        "routed the same",
    ):
        assert text in result.stderr


def test_generate_goes_on_without_the_native_operators(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ort_ops.library.LIBRARY_NAME", "libmissing.so")
    assert main(["generate", str(folder / "lm.onnx"), "--prompt", "The ", "--num-tokens", "2"]) == 0
    assert "native operators are not installed: running the portable ones" in capsys.readouterr().err


def test_generating_into_a_closed_pipe_is_no_error(folder: Path) -> None:
    code = "import sys; from lightning_modules.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", str(folder / "lm.onnx"), "--prompt", "The ", "--num-tokens", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


GENERATE_MISTAKES = [
    (["{lm}", "--prompt", "\u65e5"], "the prompt holds '\u65e5', outside the vocabulary"),
    (["{lm}", "--prompt", ""], "the prompt must have at least 1 character"),
    (["{lm}", "--prompt", "The", "--top-p", "3"], "top_p (3.0) must be > 0 and <= 1"),
    (["{lm}", "--prompt", "The", "--temperature", "-1"], "temperature (-1.0) must be"),
    (["{lm}", "--prompt", "The", "--threads", "0"], "num_threads (0) must be >= 1"),
    (["{lm}", "--prompt", "The", "--threads", "99999999999"], "num_threads (99999999999) must be >= 1 and <= 1024"),
    (["{lm}", "--prompt", "The", "--num-tokens", "x"], "argument --num-tokens: invalid int value: 'x'"),
    (["{lm}", "--promt", "The"], "unknown option --promt of `trix generate`; did you mean --prompt?"),
    (["{lm}", "--prompt", "The", "--temp", "1"], "unknown option --temp of `trix generate`"),
    (["{lm}"], "the following arguments are required: --prompt"),
    (["{folder}/missing.onnx", "--prompt", "The"], "missing.onnx: no such file"),
    (["{folder}", "--prompt", "The"], "a folder without genai_config.json, not one of `trix import`"),
    (["{folder}/text.txt", "--prompt", "The"], "text.txt: not an ONNX file, or a damaged one"),
    (["{folder}/lm.ckpt", "--prompt", "The"], "lm.ckpt: not an ONNX file, or a damaged one"),
    (["{folder}/cut.onnx", "--prompt", "The"], "cut.onnx: not an ONNX file, or a damaged one"),
]


@pytest.mark.parametrize(("arguments", "message"), GENERATE_MISTAKES)
def test_generate_tells_mistakes_in_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "lm.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(content[: len(content) // 2])
    assert main(["generate", *(text.format(lm=folder / "lm.onnx", folder=folder) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert message in err


@pytest.mark.parametrize("command", ["export", "generate"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, option]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: trix {command}")
    assert err == ""


def test_output_that_takes_nothing_gives_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "lightning_modules.cli", "generate", str(folder / "lm.onnx"), "--prompt", "The "]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr == "trix: error: the output cannot be written: No space left on device\n"


def test_generating_with_closed_outputs_is_no_error(folder: Path) -> None:
    code = (
        "import sys; sys.stdout = sys.stderr = None; from lightning_modules.cli import main\n"
        "raise SystemExit(main(['generate', sys.argv[1], '--prompt', 'The ', '--num-tokens', '2']))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder / "lm.onnx")], check=False).returncode == 0


EXPORT_MISTAKES = [
    (["--ckpt", "{folder}/missing.ckpt", "--output", "{out}/a.onnx"], "missing.ckpt cannot be read: No such file"),
    (["--ckpt", "{folder}/lm.onnx", "--output", "{out}/a.onnx"], "lm.onnx is not a checkpoint that can be loaded safely"),
    (["--ckpt", "{folder}/lm.ckpt", "--output", "{out}"], "must be a file, not a directory"),
    (["--ckpt", "{folder}/lm.ckpt", "--output", "/proc/a.onnx"], "output /proc/a.onnx cannot be written"),
    (
        ["--ckpt", "{folder}/lm.ckpt", "--output", "{out}/a.onnx", "--held-out-tokens", "1"],
        "--held-out-tokens (1) must be >= 2",
    ),
    (["--ckp", "{folder}/lm.ckpt", "--output", "{out}/a.onnx"], "unknown option --ckp of `trix export`; did you mean --ckpt?"),
    (["--ckpt", "{folder}/lm.ckpt", "--output", "{folder}/./lm.ckpt"], "must be another file than the checkpoint"),
    (["--ckpt", "{folder}/lm.ckpt", "--output", "/dev/null"], "output /dev/null must be a file, not a device"),
    (["--ckpt", "{folder}/lm.ckpt", "--output", "{out}/" + "a" * 256], "cannot be written: File name too long"),
    (
        ["--ckpt", "{folder}/changed.ckpt", "--output", "{out}/new/deep/a.onnx"],
        "the data settings of the checkpoint do not",
    ),
    (["--ckpt", "{folder}/no_data.ckpt", "--output", "{out}/a.onnx"], "data module (None) must be named by the checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), EXPORT_MISTAKES)
def test_export_tells_mistakes_in_one_line_and_leaves_nothing(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "no_data" in arguments[1]:
        save_checkpoint(LanguageModelTask(TextDataModule().vocabulary, small_network()), None, folder / "no_data.ckpt")
        capsys.readouterr()
    checkpoint = torch.load(folder / "lm.ckpt", weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["colour"] = "red"
    torch.save(checkpoint, folder / "changed.ckpt")
    assert main(["export", *(text.format(folder=folder, out=tmp_path) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert names(tmp_path) == set()


def test_a_failed_export_leaves_the_old_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(folder / "lm.ckpt", weights_only=True)
    for value in checkpoint["state_dict"].values():
        value.mul_(float("nan")) if value.is_floating_point() else None
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    (tmp_path / "a.onnx").write_text("precious")
    assert main(["export", "--ckpt", str(tmp_path / "nan.ckpt"), "--output", str(tmp_path / "a.onnx")]) == 2
    assert (tmp_path / "a.onnx").read_text() == "precious"
    assert names(tmp_path) == {"nan.ckpt", "a.onnx"}


def test_a_linked_output_stays_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real.onnx").touch()
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(tmp_path / "link.onnx")]) == 0
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").stat().st_size > 0


def test_export_notices_that_the_text_has_changed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = (folder / "text.txt").read_text()
    (folder / "text.txt").write_text(original + "~" * 300)
    try:
        assert main(["export", "--ckpt", str(folder / "lm.ckpt"), "--output", str(tmp_path / "a.onnx")]) == 2
    finally:
        (folder / "text.txt").write_text(original)
    assert "the text has changed since the training" in capsys.readouterr().err
    assert names(tmp_path) == set()
