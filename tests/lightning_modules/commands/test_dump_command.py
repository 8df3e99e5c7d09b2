"""`trix dump`: what it writes for a trained model, that it goes on, and what it refuses."""

from pathlib import Path

import pytest
from small_dumps import contents
from small_runs import SENTENCE, save_checkpoint, save_language_model, small_network

from lightning_modules.cli import main
from lightning_modules.commands import dump as module
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from trix.superposition.dump import ActivationDump


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def dump(ckpt: Path, output: Path, *arguments: str) -> int:
    return main(["dump", str(ckpt), "--site", "resid_pre.1", "--output", str(output), *arguments])


def test_each_site_gets_a_dump_of_the_text_that_was_trained_on(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--num-tokens", "100", "--shard-tokens", "40"]
    assert main(["dump", str(ckpt), "--site", "resid_pre.1", "router_in.0", "--output", str(tmp_path), *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote   {tmp_path / 'resid_pre.1'}  (104 tokens of 13 texts, width 16)"
    assert out[1] == f"wrote   {tmp_path / 'router_in.0'}  (104 tokens of 13 texts, width 16)"
    found = ActivationDump(tmp_path / "resid_pre.1")
    assert [shard.tokens for shard in found.manifest.shards] == [40, 40, 24]
    vocabulary = LanguageModelTask.load_from_checkpoint(ckpt, weights_only=True).vocabulary
    first = "".join(vocabulary[index] for index in found.column("tokids")[:8].tolist())
    assert first in SENTENCE * 2


def test_documents_do_not_overlap_so_that_some_can_be_held_out(ckpt: Path, tmp_path: Path) -> None:
    letters = "".join(map(chr, range(0x100, 0x100 + 400)))  # each once: what two documents share stands in both
    (tmp_path / "text.txt").write_text(letters)
    data = TextDataModule(path=str(tmp_path / "text.txt"), context_length=8, batch_size=4)
    own = save_checkpoint(LanguageModelTask(data.vocabulary, small_network()), data, tmp_path / "own.ckpt")
    assert dump(own, tmp_path, "--num-tokens", "300") == 0
    token_N = ActivationDump(tmp_path / "resid_pre.1").column("tokids")
    assert len(token_N) == len(token_N.unique()) == 304


def test_called_again_it_goes_on_where_it_was(ckpt: Path, tmp_path: Path) -> None:
    arguments = ("--num-tokens", "100", "--shard-tokens", "40")
    assert dump(ckpt, tmp_path, *arguments) == 0
    before = contents(tmp_path)
    assert dump(ckpt, tmp_path, *arguments) == 0
    assert contents(tmp_path) == before


def test_texts_of_the_users_own(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The fox.\n\nThe dog jumps over\n\nlazy times")
    assert dump(ckpt, tmp_path / "a", "--text", str(tmp_path / "own.txt")) == 0
    assert ActivationDump(tmp_path / "a" / "resid_pre.1").manifest.documents == 3
    (tmp_path / "own.csv").write_text("text;label\nThe fox;animal\nlazy dog;dog\nover;animal\n")
    assert dump(ckpt, tmp_path / "b", "--text", str(tmp_path / "own.csv")) == 0
    assert set(ActivationDump(tmp_path / "b" / "resid_pre.1").column("labels").tolist()) == {0, 1}


def test_all_texts_of_a_csv_are_read_though_its_two_classes_differ_in_size(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\nThe fox,animals\nThe dog,animals\nlazy times,rest\n")
    assert dump(ckpt, tmp_path, "--text", str(tmp_path / "own.csv")) == 0
    assert ActivationDump(tmp_path / "resid_pre.1").manifest.documents == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens (0) must be >= 1"),
        (["--shard-tokens", "0"], "--shard-tokens (0) must be >= 1"),
        (["--max-len", "9"], "--max-len (9) must be <= context_length (8) of the model"),
        (["--text", "x", "--num-tokens", "3"], "--num-tokens belongs to the run's own text"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--site", "resid_pre.9"], "layer (9) must be >= 0 and < number of layers (2)"),
        (["--site", "mlp_in.0"], "site (mlp_in.0) must be one of resid_pre, resid_mid, router_in, ffn_out"),
        (["--site", "resid_pre"], "site ('resid_pre') must be NAME.LAYER"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    ckpt: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dump(ckpt, tmp_path / "acts", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "acts").exists()


def test_another_dump_in_the_folder_is_refused(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dump(ckpt, tmp_path, "--num-tokens", "100") == 0
    before = contents(tmp_path)
    assert dump(ckpt, tmp_path, "--num-tokens", "100", "--dtype", "fp32") == 2
    assert "dtype of the dump that is there (bf16) must be that of this one (fp32)" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_what_is_missing_is_named_with_the_extra(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setattr(module, "_dump", fail)
    assert dump(ckpt, tmp_path) == 2
    assert "pandas must be installed for this: pip install 'trix[superposition]'" in capsys.readouterr().err


def test_what_a_part_says_of_a_missing_library_is_passed_on(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ImportError("models of Hugging Face need transformers: pip install 'trix[transformers]'")

    monkeypatch.setattr(module, "_dump", fail)
    assert dump(ckpt, tmp_path) == 2
    assert "error: models of Hugging Face need transformers: pip install 'trix[transformers]'" in capsys.readouterr().err
