"""``trix surgery``: the new checkpoint has the edit and nothing else that is new; a mistake gives one line and no file."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from forked_scripts import run_script
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_runs import MakeTrainer
from torch import Tensor

from lightning_modules import whole_files
from lightning_modules.cli import main
from lightning_modules.commands.surgery import is_equal
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import load_checkpoint
from trix.nn import RoutedLayer, routed_layers

SIGNS = "-+0-" * 4
SIGNATURE = torch.tensor([-1.0, 1.0, 0.0, -1.0] * 4)
ROUTER = "network.stack.blocks.1.feed_forward.inner.router"
HISTORY = "network.stack.blocks.1.feed_forward.inner.surgery_log._extra_state"


def operate(ckpt: Path, output: Path, action: str, *options: str, tile: int = 3) -> int:
    where = ["--layer", "1", "--tile", str(tile), "--tag", "a concept", "--output", str(output)]
    return main(["surgery", str(ckpt), action, *where, *options])


def layer_of(ckpt: Path) -> RoutedLayer:
    return routed_layers(load_checkpoint(ckpt)[0].network)[1]


def parts(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in parts(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {name: leaf for index, item in enumerate(value) for name, leaf in parts(item, f"{path}/{index}").items()}
    return {path: value}


def differences(one: Path, other: Path) -> set[str]:
    """The paths of the parts of two checkpoints that differ."""
    first, second = (parts(torch.load(path, weights_only=True)) for path in (one, other))
    same = {
        name
        for name in first.keys() & second.keys()
        if (torch.equal(first[name], second[name]) if isinstance(first[name], Tensor) else first[name] == second[name])
    }
    return (first.keys() | second.keys()) - same


def test_an_inserted_signature_is_held_and_nothing_else_is_new(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, output = checkpoints / "lm.ckpt", tmp_path / "new" / "lm.ckpt"
    content = ckpt.read_bytes()
    assert operate(ckpt, output, "insert", "--signature", SIGNS) == 0
    layer = layer_of(output)
    assert torch.equal(layer.get_tile_signatures()[3], SIGNATURE)
    assert layer.is_frozen(3)
    (entry,) = layer.get_surgery_history()
    assert (entry["operation"], entry["tile_idx"], entry["tag"], entry["frozen"]) == ("insert", 3, "a concept", True)
    names = {"is_frozen_E", "frozen_value_ED", "balance_bias", "balance_age_E"}
    assert differences(ckpt, output) == {f"/state_dict/{HISTORY}"} | {f"/state_dict/{ROUTER}.{name}" for name in names}
    versions = [torch.load(path, weights_only=True)["state_dict"]._metadata for path in (ckpt, output)]
    assert versions[0] == versions[1] != {}
    assert ckpt.read_bytes() == content
    assert [path.name for path in output.parent.iterdir()] == ["lm.ckpt"]
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "edited  layer 1, tile 3: insert, tag 'a concept'"
    assert lines[1].endswith(" zeros, not frozen")
    assert lines[2] == "after   4 +, 8 -, 4 zeros, frozen"
    assert all(name in lines[3] for name in names)
    num_equal = len(torch.load(ckpt, weights_only=True)["state_dict"]) - 5
    assert lines[4] == f"wrote   {output}  (read again: the edit stands, the other {num_equal} weights and buffers are equal)"


def test_a_signature_can_be_left_to_learn(checkpoints: Path, tmp_path: Path) -> None:
    assert operate(checkpoints / "lm.ckpt", tmp_path / "new.ckpt", "insert", f"--signature={SIGNS}", "--no-freeze") == 0
    layer = layer_of(tmp_path / "new.ckpt")
    assert not layer.is_frozen(3)
    assert torch.equal(layer.get_raw_signatures()[3], SIGNATURE)


def test_freezing_and_unfreezing(checkpoints: Path, tmp_path: Path) -> None:
    original, frozen, learning = checkpoints / "lm.ckpt", tmp_path / "frozen.ckpt", tmp_path / "learning.ckpt"
    assert operate(original, frozen, "freeze", tile=0) == 0
    assert layer_of(frozen).is_frozen(0)
    assert operate(frozen, learning, "unfreeze", tile=0) == 0
    assert not layer_of(learning).is_frozen(0)
    assert torch.equal(layer_of(learning).get_tile_signatures(), layer_of(original).get_tile_signatures())
    assert [entry["operation"] for entry in layer_of(learning).get_surgery_history()] == ["freeze", "unfreeze"]


def test_a_removed_tile_is_free_in_the_new_checkpoint(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new.ckpt"
    assert operate(checkpoints / "lm.ckpt", output, "remove") == 0
    assert "after   removed" in capsys.readouterr().out
    assert layer_of(output).router.is_free_E.tolist() == [False, False, False, True]
    assert layer_of(output).get_surgery_history()[-1]["operation"] == "remove"
    assert operate(output, tmp_path / "again.ckpt", "remove") == 2
    assert "tile_idx (3) must be a tile in use, not a free slot" in capsys.readouterr().err


def test_a_signature_can_come_from_a_file(checkpoints: Path, tmp_path: Path) -> None:
    analysis = {
        "positive_dims": (SIGNATURE > 0).nonzero().flatten().tolist(),
        "negative_dims": (SIGNATURE < 0).nonzero().flatten().tolist(),
    }
    for name, content in (("list", SIGNATURE.tolist()), ("dims", analysis)):
        path, output = tmp_path / f"{name}.json", tmp_path / f"{name}.ckpt"
        path.write_text(json.dumps(content))
        assert operate(checkpoints / "lm.ckpt", output, "insert", "--signature", str(path)) == 0
        assert torch.equal(layer_of(output).get_tile_signatures()[3], SIGNATURE)


def test_training_goes_on_and_holds_the_signature(checkpoints: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    output = tmp_path / "new.ckpt"
    assert operate(checkpoints / "lm.ckpt", output, "insert", "--signature", SIGNS) == 0
    task, _ = load_checkpoint(checkpoints / "lm.ckpt")
    text = TextDataModule(path=checkpoints / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    trainer: L.Trainer = make_trainer(max_steps=4)
    trainer.fit(task, text, ckpt_path=output, weights_only=True)
    assert trainer.global_step == 4
    layer = routed_layers(task.network)[1]
    assert torch.equal(layer.get_raw_signatures()[3], SIGNATURE)
    assert not torch.equal(layer.get_raw_signatures()[0], layer_of(output).get_raw_signatures()[0])
    assert [entry["tag"] for entry in layer.get_surgery_history()] == ["a concept"]


WHERE = ["--layer", "0", "--tile", "0", "--tag", "t", "--output", "{out}"]
INSERT = ["{lm}", "insert", *WHERE]
MISTAKES = [
    ([], "the following arguments are required: MODEL, action, --layer, --tile, --output"),
    (["{lm}", "freeze", "--layer", "0", "--tile", "0", "--output", "{out}"], "the following arguments are required: --tag"),
    (["{lm}", "freze", *WHERE], "argument action: invalid choice: 'freze'"),
    (INSERT, "insert needs a signature: --signature SIGNS, --signature FILE.json or --ngrams"),
    ([*INSERT, "--signature", ""], "insert needs a signature: --signature SIGNS, --signature FILE.json or --ngrams"),
    ([*INSERT, "--signature", "-0+"], "lm.ckpt: signature (3,) must have shape (16,)"),
    ([*INSERT, "--signature", "--0+"], "lm.ckpt: signature (4,) must have shape (16,)"),
    ([*INSERT, "--signature", "+x"], "--signature (+x) must be a row of +, 0 and -, or a file that can be read: No such file"),
    ([*INSERT, "--signature", "{dir}/text.json"], "text.json must hold JSON: "),
    (
        [*INSERT, "--signature", "{dir}/words.json"],
        "words.json must hold a list of numbers, or positive_dims and",
    ),
    ([*INSERT, "--signature", "{dir}/true.json"], "true.json must hold a list of numbers, or positive_dims and negative_dims"),
    ([*INSERT, "--signature", "{dir}/half.json"], "lm.ckpt: signature[1] (0.5) must be -1, 0 or 1"),
    ([*INSERT, "--signature", "{dir}/far.json"], "far.json: negative_dims (16) must be >= 0 and < d_model (16)"),
    ([*INSERT, "--signature", "{dir}/twice.json"], "twice.json: negative_dims (1) must not be named twice"),
    ([*INSERT, "--signature", "{dir}/one_sided.json"], "one_sided.json: negative_dims must be a list of integers"),
    (["{lm}", "freeze", *WHERE, "--signature", "+"], "--signature belongs to insert, not to freeze"),
    (["{lm}", "unfreeze", *WHERE, "--no-freeze"], "--no-freeze belongs to insert, not to unfreeze"),
    (["{lm}", "unfreeze", *WHERE], "lm.ckpt: nothing to unfreeze: tile (0) of layer (0) is not frozen"),
    (["{lm}", "freeze", *WHERE, "--layer", "2"], "lm.ckpt: layer (2) must be >= 0 and < number of routed layers (2)"),
    (["{lm}", "freeze", *WHERE, "--layer", "-1"], "lm.ckpt: layer (-1) must be >= 0 and < number of routed layers (2)"),
    (["{lm}", "freeze", *WHERE, "--tile", "4"], "lm.ckpt: tile_idx (4) must be >= 0 and < num_tiles (4)"),
    (["{lm}", "freeze", *WHERE, "--output", "{lm}"], "must be another file than the checkpoint, which it would replace"),
    (["{lm}", "freeze", *WHERE, "--output", "{dir}"], "must be a file, not a directory"),
    (["{lm}", "freeze", *WHERE, "--output", "{dir}/half.json"], "half.json must not exist yet: no file is replaced"),
    (["{lm}", "freeze", *WHERE, "--output", "{dir}/half.json/new.ckpt"], "new.ckpt cannot be written: "),
    (["{lm}", "freeze", *WHERE, "--tiles", "1"], "unknown option --tiles of `trix surgery`; did you mean --tile?"),
    (["{hash}", "freeze", *WHERE], "hash.ckpt: a router of type HashRouter has no signatures to freeze or insert"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line_and_no_file(
    arguments: list[str], message: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signatures = {
        "words": ["+"] * 16,
        "true": [True] * 16,
        "half": [0, 0.5] * 8,
        "far": {"positive_dims": [], "negative_dims": [16]},
        "twice": {"positive_dims": [1], "negative_dims": [1]},
        "one_sided": {"positive_dims": [1]},
    }
    for name, content in signatures.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "text.json").write_text("+0-")
    before = {path: path.read_bytes() for path in (*tmp_path.rglob("*"), checkpoints / "lm.ckpt")}
    paths = {name: checkpoints / f"{name}.ckpt" for name in ("lm", "hash")} | {"dir": tmp_path, "out": tmp_path / "a" / "new"}
    assert main(["surgery", *(text.format(**paths) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert message in err
    assert {path: path.read_bytes() for path in (*tmp_path.rglob("*"), checkpoints / "lm.ckpt")} == before


def test_what_is_frozen_already_cannot_be_frozen(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert operate(checkpoints / "lm.ckpt", tmp_path / "one.ckpt", "freeze") == 0
    capsys.readouterr()
    assert operate(tmp_path / "one.ckpt", tmp_path / "two.ckpt", "freeze") == 2
    assert "one.ckpt: nothing to freeze: tile (3) of layer (1) is frozen already" in capsys.readouterr().err
    assert not (tmp_path / "two.ckpt").exists()


def test_what_is_no_checkpoint_of_a_routed_model_leaves_nothing(
    no_checkpoint: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, message = no_checkpoint
    assert main(["surgery", path, "freeze", *(text.format(out=tmp_path / "a" / "new") for text in WHERE)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["edit", "history", "optimizer", "weight", "key"])
def test_a_file_that_is_not_as_it_should_be_never_gets_its_name(
    part: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrongly(checkpoint: dict[str, Any], path: Path) -> None:
        checkpoint = copy.deepcopy(checkpoint)
        state = checkpoint["state_dict"]
        if part == "edit":
            state[f"{ROUTER}.is_frozen_E"].zero_()
        elif part == "history":
            state[HISTORY] = torch.tensor(list(b"[]"), dtype=torch.uint8)
        elif part == "optimizer":
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 7.0
        elif part == "weight":
            next(value for value in state.values() if value.is_floating_point())[0] += 1
        else:
            state["network.head.bias"] = torch.ones(1)
        torch.save(checkpoint, path)

    monkeypatch.setattr(whole_files, "save", save_wrongly)
    with pytest.raises(RuntimeError, match=r"must stand in the new checkpoint.*; no file is written"):
        operate(checkpoints / "lm.ckpt", tmp_path / "a" / "new.ckpt", "freeze")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_surgery_leaves_nothing_that_stays(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os, signal, sys; from lightning_modules.commands import surgery\n"
        "surgery.check_written = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "surgery.run_surgery(sys.argv[1:])"
    )
    where = ["--layer", "1", "--tile", "0", "--tag", "t", "--output", "new.ckpt"]
    assert run_script(code, str(checkpoints / "lm.ckpt"), "freeze", *where).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new.ckpt.")
    assert main(["inspect", str(checkpoints / "lm.ckpt"), "--output", str(tmp_path / "page.html")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": [1, torch.tensor([float("nan")])]}, {"a": [1, torch.tensor([float("nan")])]}, True),
        (float("nan"), float("nan"), True),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (1, 1.0, False),
        (1, True, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ([1], [1, 2], False),
        ((1,), [1], False),
        ("a", "b", False),
    ],
)
def test_equality_is_of_types_and_values(one: Any, other: Any, expected: bool) -> None:
    assert is_equal(one, other) == expected


def test_mistakes_and_help_are_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "assert main(['surgery', '--help']) == 0\n"
        "assert main(['surgery', '--wrong']) == 2\n"
        "where = ['--layer', '0', '--tile', '0', '--tag', 't', '--output', 'new.onnx']\n"
        "assert main(['surgery', 'missing.onnx', 'freeze', *where]) == 2\n"
        "heavy = [name for name in ('torch', 'lightning', 'trix.nn') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "trix: error: missing.onnx: No such file" in result.stderr


def test_both_copies_of_averaged_weights_are_edited(
    checkpoints: Path, tmp_path: Path, make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TextDataModule(path=checkpoints / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    averaged, output = tmp_path / "averaged.ckpt", tmp_path / "new.ckpt"
    trainer = make_trainer(max_steps=3, callbacks=[EMAWeightAveraging(decay=0.9)])
    trainer.fit(load_checkpoint(checkpoints / "lm.ckpt")[0], text)
    trainer.save_checkpoint(averaged)
    assert operate(averaged, output, "insert", "--signature", SIGNS) == 0
    out, err = capsys.readouterr()
    assert "also in current_model_state: the trained weights, of which the others are an average" in out
    assert err == ""
    facts = ("is_frozen_E", "frozen_value_ED", "balance_bias", "balance_age_E")
    names = (*(f"{ROUTER}.{name}" for name in facts), HISTORY)
    copies = ("state_dict", "current_model_state")
    assert differences(averaged, output) == {f"/{key}/{name}" for key in copies for name in names}
    written = torch.load(output, weights_only=True)
    for key in copies:
        task, _ = load_checkpoint(output)
        task.load_state_dict(written[key])
        assert torch.equal(routed_layers(task.network)[1].get_tile_signatures()[3], SIGNATURE)
    resumed = load_checkpoint(checkpoints / "lm.ckpt")[0]
    trainer = make_trainer(max_steps=6, callbacks=[EMAWeightAveraging(decay=0.9)])
    trainer.fit(resumed, text, ckpt_path=output, weights_only=True)
    assert torch.equal(routed_layers(resumed.network)[1].get_tile_signatures()[3], SIGNATURE)

    written["current_model_state"] = 3
    torch.save(written, averaged)
    assert operate(averaged, tmp_path / "other.ckpt", "freeze", tile=0) == 2
    assert "current_model_state (int) of the checkpoint must be of type dict" in capsys.readouterr().err


def test_a_checkpoint_of_before_frozen_values_were_ternary_is_edited_in_one_layer_alone(
    checkpoints: Path, tmp_path: Path
) -> None:
    old, frozen, output = tmp_path / "old.ckpt", tmp_path / "frozen.ckpt", tmp_path / "new.ckpt"
    assert operate(checkpoints / "lm.ckpt", frozen, "insert", "--signature", SIGNS) == 0
    content = torch.load(frozen, weights_only=True)
    for name, value in content["state_dict"].items():
        if name.endswith("frozen_value_ED"):
            content["state_dict"][name] = 0.7 * value.float()
    torch.save(content, old)
    assert operate(old, output, "unfreeze") == 0
    names = (f"{ROUTER}.is_frozen_E", f"{ROUTER}.raw_signatures", HISTORY)
    assert differences(old, output) == {f"/state_dict/{name}" for name in names}
    assert torch.equal(layer_of(output).get_tile_signatures()[3], SIGNATURE)
