"""Commands on a model that routes on context: n-grams instead of dimensions, and a signature designed for some."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import SENTENCE, save_checkpoint, small_network
from torch.utils.data import TensorDataset

from lightning_modules.cli import main
from lightning_modules.commands.onnx_ngrams import ngrams_by_tile
from lightning_modules.commands.surgery_ngrams import split_ngrams
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import ClassifierTask, LanguageModelTask, load_checkpoint
from ort_ops.file_format import FileRecord
from ort_ops.signature_layers import read_model
from trix.introspection import TriXIntrospector
from trix.introspection.ngrams import NgramReader, ngrams_at
from trix.nn import ClassifierConfig, FFNConfig


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


def insert(ckpt: Path, output: Path, *options: str) -> int:
    return main(["surgery", str(ckpt), "insert", "--layer", "1", "--tile", "3", "--output", str(output), *options])


def test_a_signature_is_designed_predicted_inserted_and_measured(
    context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new.ckpt"
    assert insert(context_checkpoint, output, "--ngrams", "ox,Th") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    predicted = re.match(
        r"claims  2 of the 2 n-grams, (\S+)% of the text, and (\S+)% besides: (\S+)% \(n-grams of 640 ", lines[0]
    )
    assert predicted is not None
    assert lines[0].endswith("% (n-grams of 640 tokens: training text)")
    assert re.match(r"        'ox'  yes; \d\.\d\d% of the text, until now of tile \d$", lines[1])
    assert re.match(r"        'Th'  yes; \d\.\d\d% of the text, until now of tile \d$", lines[2])
    assert [line.split()[0] for line in lines[3:10]] == ["besides", "from", "leaves", "edited", "before", "after", "changed"]
    assert lines[6] == "edited  layer 1, tile 3: insert, tag 'ox,Th'"
    found = re.match(
        r"found   (\S+)% of (\d+) tokens of held-out data go to tile 3 \(their own n-grams predict (\S+)%\); "
        r"of the (\d+) at which a requested n-gram ends, (\d+)$",
        lines[10],
    )
    assert found is not None
    assert found[1] == found[3]
    assert float(found[1]) == pytest.approx(float(predicted[3]), abs=2.0)
    assert found[4] == found[5] != "0"
    assert lines[11].startswith(f"wrote   {output}")

    task, _ = load_checkpoint(output)
    reader = NgramReader(task.network)
    assert reader.layers[1].is_frozen(3)
    wanted_MJ = torch.tensor([[task.vocabulary.index(character) for character in ngram] for ngram in ("ox", "Th")])
    assert reader.decide(wanted_MJ, 1).tile_idx[:, 0].tolist() == [3, 3]
    *_, entry = reader.layers[1].get_surgery_history()
    assert (entry["operation"], entry["tag"], entry["frozen"]) == ("insert", "ox,Th", True)


def test_ngrams_have_escapes_may_begin_with_a_dash_and_the_signature_may_learn_on(
    context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert insert(context_checkpoint, tmp_path / "new.ckpt", "--ngrams", r".\n", "--no-freeze", "--tag", "ends") == 0
    out = capsys.readouterr().out
    assert r"'.\n'  yes; " in out
    assert "tag 'ends'" in out
    assert not NgramReader(load_checkpoint(tmp_path / "new.ckpt")[0].network).layers[1].is_frozen(3)
    assert insert(context_checkpoint, tmp_path / "other.ckpt", "--ngrams", r"-o,\--") == 2
    assert "n-gram '-o' holds '-', outside the vocabulary of the model" in capsys.readouterr().err
    assert split_ngrams(r"a\,,\\\t,\--") == ["a,", "\\\t", "--"]


def test_without_the_data_each_possible_ngram_counts_once(
    context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(context_checkpoint, weights_only=True)
    content["datamodule_hyper_parameters"]["path"] = str(tmp_path / "gone.txt")
    torch.save(content, tmp_path / "orphan.ckpt")
    assert insert(tmp_path / "orphan.ckpt", tmp_path / "new.ckpt", "--ngrams", "ox") == 0
    out, err = capsys.readouterr()
    assert err == ""
    num_ngrams = len(set(SENTENCE)) ** 2
    assert f"(n-grams of {num_ngrams:,} tokens: each possible one once)" in out
    assert re.search(r"^not measured: .*gone.txt", out, re.MULTILINE)


def test_padding_is_in_no_possible_ngram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = "\0\N{REPLACEMENT CHARACTER} abcé"
    network = ClassifierConfig(16, 2, 2, context_length=8, ffn=FFNConfig(num_tiles=4, route_on="context"))
    batches = TensorDataset(torch.ones(4, 8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    unnamed = L.LightningDataModule.from_datasets(batches, batches)
    ckpt = save_checkpoint(
        ClassifierTask(None, 2, ("de", "fr"), network, vocabulary=vocabulary), unnamed, tmp_path / "texts.ckpt"
    )
    assert insert(ckpt, tmp_path / "new.ckpt", "--ngrams", "ab") == 0
    assert f"(n-grams of {(len(vocabulary) - 1) ** 2} tokens: each possible one once)" in capsys.readouterr().out


MISTAKES = [
    (
        ["--ngrams", "the"],
        "n-gram 'the' (length 3) must have length 2: the model reads 2 characters at a time (context_tokens)",
    ),
    (["--ngrams", "ox,,Th"], "n-gram '' (length 0) must have length 2"),
    (["--ngrams", "ox,ß "], "n-gram 'ß ' holds 'ß', outside the vocabulary of the model"),
    (["--ngrams", "ox,Th,ox"], "n-gram 'ox' must not be named twice"),
    (["--ngrams", r"o\x"], r"--ngrams (o\x): a backslash must be followed by n, t, a comma, a dash or a back"),
    (["--ngrams", "ox", "--signature", "+-"], "--signature and --ngrams cannot both be given"),
    (["--ngrams", ""], "n-gram '' (length 0) must have length 2"),
    (["--ngrams"], "argument --ngrams: expected one argument"),
    (["--ngrams", "ox", "--tile", "8"], "tile_idx (8) must be >= 0 and < num_tiles (8)"),
    (["--ngrams", "ox", "--layer", "2"], "layer (2) must be >= 0 and < number of routed layers (2)"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_gives_one_line_and_no_file(
    options: list[str], message: str, context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert insert(context_checkpoint, tmp_path / "new.ckpt", *options) == 2
    check_error(capsys, message, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm", "lm.ckpt: --ngrams needs a model that routes on context (route_on: context), which this one does not"),
        ("hash", "hash.ckpt: a router of type HashRouter has no signatures"),
        ("texts", "texts.ckpt: --ngrams needs a model that routes on context"),
    ],
)
def test_a_model_without_ngrams_gives_one_line(
    name: str, message: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ngrams", "ox", "--layer", "0"]
    assert insert(checkpoints / f"{name}.ckpt", tmp_path / "new.ckpt", *options) == 2
    check_error(capsys, message, tmp_path)


def test_ngrams_belong_to_insert(context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--layer", "0", "--tile", "0", "--tag", "t", "--output", str(tmp_path / "new.ckpt")]
    assert main(["surgery", str(context_checkpoint), "freeze", *where, "--ngrams", "ox"]) == 2
    check_error(capsys, "--ngrams belongs to insert, not to freeze", tmp_path)


def check_error(capsys: pytest.CaptureFixture[str], message: str, folder: Path) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert message in err
    assert not list(folder.iterdir())


def test_an_exported_file_names_its_tiles_by_ngrams_and_takes_none(
    context_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, page = tmp_path / "model.onnx", tmp_path / "page.html"
    assert main(["export", "--ckpt", str(context_checkpoint), "--output", str(model)]) == 0
    assert main(["inspect", str(model), "--output", str(page)]) == 0
    content = page.read_text()
    assert content.count("N-grams: what of the example goes there, and its share of the example.") == 2
    assert "<code>⊢" in content
    reader, (vocabulary, by_tile) = NgramReader(load_checkpoint(context_checkpoint)[0].network), example_of(model)
    for layer, tiles in enumerate(by_tile):
        for tile, count in enumerate(tiles):
            for ngram in count:
                ids = [-1 if character == "⊢" else vocabulary.index(character) for character in ngram]
                assert int(reader.decide(torch.tensor([ids]), layer).tile_idx) == tile
    capsys.readouterr()
    assert insert(model, tmp_path / "new.onnx", "--ngrams", "ox") == 2
    assert "model.onnx: --ngrams needs a checkpoint: an exported model does not contain the codes" in capsys.readouterr().err


def example_of(model: Path) -> tuple[str, list[list[Counter[str]]]]:
    _, about, layers, _ = read_model(model)
    by_tile = ngrams_by_tile(about, len(layers))
    assert by_tile is not None
    assert about.vocabulary is not None
    return about.vocabulary, by_tile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"ffn": {"route_on": "context", "context_tokens": 0}}}, r"context_tokens \(0\) must be >= 1 and <= 64"),
        ({"reference": {"input": [[0, 9]], "tile_idx": [[[[0]], [[0]]]]}}, r"input of the reference \(9\) must be >= 0 and <"),
        ({"reference": {"input": [0], "tile_idx": [0]}}, r"input of the reference \(1 axes\) must have 2"),
    ],
)
def test_a_damaged_example_is_refused(changes: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {
        "task": "language_model",
        "float32_bytes": 4,
        "vocabulary": "abc",
        "config": {"ffn": {"route_on": "context", "context_tokens": 2}},
        "reference": {"input": [[0, 1]], "tile_idx": [[[[0]], [[1]]]]},
    }
    assert ngrams_by_tile(FileRecord(**whole), 1) == [[Counter({"⊢a": 1}), Counter({"ab": 1})]]
    with pytest.raises(ValueError, match=message):
        ngrams_by_tile(FileRecord(**(whole | changes)), 1)
