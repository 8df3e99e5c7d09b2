"""``trix upcycle``: the new checkpoint has the tiles, training goes on from it, and a mistake gives one line and no file."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_runs import SENTENCE, MakeTrainer, save_checkpoint, small_network

from lightning_modules import whole_files
from lightning_modules.cli import main
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask, load_checkpoint
from ort_ops.runtime import ExportedModel
from trix.nn import FFNConfig, routed_layers
from trix.upcycling import held_out_loss
from trix.upcycling.one_tile import down_of_tiles, up_of_tiles

FFN = {"one_tile": {"num_tiles": 1, "d_ff": 24, "route_on": "hidden"}, "dense": {"kind": "dense", "d_ff": 24}}
WHERE = ["--tiles", "4", "--top-k", "2", "--text-tokens", "400", "--held-out-tokens", "160"]


@pytest.fixture(scope="module", params=FFN)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `trix fit`, stopped within an epoch, with all that it leaves by default."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(SENTENCE * 30)
    network = {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8, "ffn": FFN[request.param]}
    data = {"path": str(folder / "text.txt"), "context_length": 8, "batch_size": 4, "batches_per_epoch": 7}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}},
        *([{"class_path": name} for name in ("DiversityMonitor", "RoutingMonitor") if request.param == "one_tile"]),
    ]
    config = {
        "model": {"class_path": "LanguageModelTask", "init_args": {"network": network}},
        "data": {"class_path": "TextDataModule", "init_args": data},
        "trainer": {
            "max_steps": 10,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(folder / "runs"), "name": "small"}},
            "callbacks": callbacks,
        },
        "report": {"num_tokens": 0},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "small.yaml")]) == 0
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def upcycled(run: Path) -> tuple[Path, str, dict[str, Any]]:
    """The new checkpoint, what was printed, and the report, of a call."""
    output, losses = run.parent.parent / "tiles.ckpt", run.parent.parent / "losses.json"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        assert main(["upcycle", str(run), *WHERE, "--output", str(output), "--report", str(losses)]) == 0
    return output, "\n".join(printed), json.loads(losses.read_text())


def test_the_losses_are_those_of_the_files(run: Path, upcycled: tuple[Path, str, dict[str, Any]]) -> None:
    output, printed, report = upcycled
    original, made = load_checkpoint(report["checkpoint"])[0], load_checkpoint(output)[0]
    text = TextDataModule(path=run.parent.parent / "text.txt", context_length=8)
    token_BT, target_BT = (torch.cat(parts)[:20] for parts in zip(*text.val_dataloader(), strict=True))
    assert report["original"] == pytest.approx(held_out_loss(original.network, token_BT, target_BT), rel=1e-6)
    assert report["upcycled"] == pytest.approx(held_out_loss(made.network, token_BT, target_BT), rel=1e-6)
    if report["was_dense"]:
        assert report["all_tiles"] != pytest.approx(report["original"], rel=1e-4)
    else:
        assert report["all_tiles"] == pytest.approx(report["original"], rel=1e-5)
    names = ("original", "all_tiles", "upcycled", "random_groups", "pruned_by_activity", "pruned_by_magnitude", "best_choice")
    for name in names:
        assert f"loss    {report[name]:.4f}  " in printed
    controls = (report["random_groups"], report["pruned_by_activity"], report["pruned_by_magnitude"])
    assert ("note    a control does as well" in printed) == (report["upcycled"] >= min(controls))
    assert "cut     2 layers of 24 neurons into 4 tiles of 6, of which a token goes to 2" in printed
    assert "text    400 tokens of the training text to group and fit; held out: 160 tokens" in printed


def test_the_checkpoint_says_where_its_tiles_come_from(upcycled: tuple[Path, str, dict[str, Any]]) -> None:
    task, checkpoint = load_checkpoint(upcycled[0])
    ffn = checkpoint["hyper_parameters"]["network"]["ffn"]
    assert (ffn["kind"], ffn["num_tiles"], ffn["d_ff"], ffn["top_k"]) == ("trix", 4, 24, 2)
    for layer in routed_layers(task.network):
        assert layer.get_surgery_history()[-1]["operation"] == "upcycle"
        assert layer.get_surgery_history()[-1]["num_tokens"] == 400
        assert not layer.frozen_tiles().any()


def test_the_optimizers_memory_of_a_weight_moves_with_it(upcycled: tuple[Path, str, dict[str, Any]]) -> None:
    output, _, report = upcycled
    (old, old_content), (new, content) = load_checkpoint(report["checkpoint"]), load_checkpoint(output)
    old_state, new_state = (
        dict(zip([name for name, _ in task.named_parameters()], range(1000), strict=False)) for task in (old, new)
    )
    (before,), (after,) = old_content["optimizer_states"], content["optimizer_states"]
    assert after["param_groups"][0]["params"] == list(range(len(new_state)))
    assert {key: value for key, value in after["param_groups"][0].items() if key != "params"} == {
        key: value for key, value in before["param_groups"][0].items() if key != "params"
    }
    for name, place in new_state.items():
        if name.endswith("raw_signatures"):
            assert place not in after["state"]
            continue
        old_name = name if name in old_state else name.replace(".tiles.", ".")
        memory, old_memory = after["state"][place], before["state"][old_state[old_name]]
        assert memory.keys() == old_memory.keys()
        for key, value in old_memory.items():
            if ".tiles." not in name or value.dim() == 0:
                assert torch.equal(memory[key], value)
                continue
            # The groups are read from the rows of up, which moved as they were.
            part = name.rpartition(".tiles.")[0]
            up_FD = dict(old.named_parameters())[old_name.replace("down", "up")].reshape(24, 16)
            up_EHD = dict(new.named_parameters())[f"{part}.tiles.up.weight"]
            groups_EH = (up_EHD.unsqueeze(2) == up_FD).all(dim=-1).int().argmax(dim=-1)
            deal = up_of_tiles if ".up." in name else down_of_tiles
            assert torch.equal(memory[key], deal(value.reshape(value.shape[-2:]), groups_EH))


def test_the_printed_command_goes_on_with_the_training(
    run: Path, upcycled: tuple[Path, str, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^go on   trix (.*)$", upcycled[1], re.MULTILINE)
    assert main([*shlex.split(command.replace("STEPS", "14"))]) == 0, capfd.readouterr().err
    task, checkpoint = load_checkpoint(run / "version_1" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 14
    before = routed_layers(load_checkpoint(upcycled[0])[0].network)
    for layer, of_before in zip(routed_layers(task.network), before, strict=True):
        assert layer.router.gate == "ones"
        assert not torch.equal(layer.tiles.up.weight, of_before.tiles.up.weight)
        assert not torch.equal(layer.get_raw_signatures(), of_before.get_raw_signatures())
        assert layer.get_surgery_history()[-1]["operation"] == "upcycle"
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=16"]) == 0, capfd.readouterr().err


def test_it_is_read_and_exported_like_any_other(
    upcycled: tuple[Path, str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, exported = str(upcycled[0]), tmp_path / "model.onnx"
    assert main(["why", ckpt, "--prompt", "The"]) == 0
    assert main(["inspect", ckpt, "--output", str(tmp_path / "page.html"), "--num-tokens", "80"]) == 0
    assert "upcycle" in (tmp_path / "page.html").read_text()
    assert main(["export", "--ckpt", ckpt, "--output", str(exported), "--held-out-tokens", "80"]) == 0
    for use_library in (True, False):
        assert ExportedModel(exported, use_library).check_parity().max_relative_difference < 1e-4
    assert main(["inspect", str(exported), "--output", str(tmp_path / "file.html")]) == 0
    assert "upcycle" in (tmp_path / "file.html").read_text()
    assert (
        main(["surgery", str(exported), "freeze", "--layer", "0", "--tile", "1", "--tag", "x", "--output", f"{exported}.onnx"])
        == 0
    )
    assert capsys.readouterr().err == ""


def test_with_all_tiles_there_is_nothing_to_compare_and_signatures_can_be_frozen(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, where = tmp_path / "a" / "all.ckpt", ["--text-tokens", "80", "--held-out-tokens", "80"]
    arguments = ["--tiles", "4", "--top-k", "4", "--freeze", *where, "--output", str(output)]
    assert main(["upcycle", str(checkpoints / "dense.ckpt"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("loss    ") == 2
    assert "trix fit --resume" in printed
    assert "--config CONFIG_OF_THE_RUN" in printed
    assert [path.name for path in output.parent.iterdir()] == ["all.ckpt"]
    assert all(layer.frozen_tiles().all() for layer in routed_layers(load_checkpoint(output)[0].network))


def test_averaged_weights_and_those_that_they_are_of_are_cut_alike(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    (tmp_path / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=tmp_path / "text.txt", context_length=8, batch_size=4, batches_per_epoch=4)
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=1, d_ff=24, route_on="hidden")))
    trainer = make_trainer(max_steps=3, callbacks=[EMAWeightAveraging(decay=0.9)])
    trainer.fit(task, text)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    content = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    for name, value in content["current_model_state"].items():
        if name.endswith("tiles.up.weight"):
            content["current_model_state"][name] = 2 * value
    torch.save(content, tmp_path / "averaged.ckpt")
    output = tmp_path / "new.ckpt"
    assert main(["upcycle", str(tmp_path / "averaged.ckpt"), *WHERE, "--output", str(output)]) == 0
    made, written = load_checkpoint(output)
    averages = routed_layers(made.network)
    current = LanguageModelTask(text.vocabulary, made.network.config)
    current.load_state_dict(written["current_model_state"])
    for average, trained in zip(averages, routed_layers(current.network), strict=True):
        assert torch.equal(average.get_tile_signatures(), trained.get_tile_signatures())
        assert torch.equal(average.router.balance_bias, trained.router.balance_bias)
        assert torch.equal(2 * average.tiles.up.weight, trained.tiles.up.weight)
        assert average.get_surgery_history() == trained.get_surgery_history()
    trainer = make_trainer(max_steps=6, callbacks=[EMAWeightAveraging(decay=0.9)])
    trainer.fit(LanguageModelTask(text.vocabulary, made.network.config), text, ckpt_path=output, weights_only=True)
    assert trainer.global_step == 6


MISTAKES = [
    (["{one}", "--tiles", "5", "--top-k", "2"], "one.ckpt: num_tiles (5) must divide the neurons of a layer (24)"),
    (["{one}", "--tiles", "4", "--top-k", "5"], "one.ckpt: top_k (5) must be >= 1 and <= num_tiles (4)"),
    (["{lm}", "--tiles", "4", "--top-k", "2"], "lm.ckpt: num_tiles (4) of the layer must be 1: it is cut into tiles already"),
    (["{digits}", "--tiles", "4", "--top-k", "2"], "digits.ckpt: task (ClassifierTask) must be LanguageModelTask"),
    (["{one}", "--tiles", "4", "--top-k", "2", "--output", "{lm}"], "lm.ckpt must not exist yet: no file is replaced"),
    (
        ["{one}", "--tiles", "4", "--top-k", "2", "--output", "{one}"],
        "must be another file than the checkpoint",
    ),
    (["{one}", "--tiles", "4", "--top-k", "2", "--output", "{dir}"], "must be a file, not a directory"),
    (
        ["{one}", "--tiles", "4", "--top-k", "2", "--output", "{dir}/a.onnx"],
        "must not end with .onnx: that ending is for exported models",
    ),
    (
        ["{one}", "--tiles", "4", "--top-k", "2", "--output", "{dir}/a.ckpt", "--report", "{dir}/a.ckpt"],
        "must be another file than --output",
    ),
    (["{one}", "--tiles", "4", "--top-k", "2", "--report", "{lm}"], "lm.ckpt must not exist yet: no file is replaced"),
    (["{one}", "--tiles", "4", "--top-k", "2", "--text-tokens", "0"], "--text-tokens (0) must be >= 1"),
    (["{one}", "--tiles", "4", "--top-k", "2", "--held-out-tokens", "-1"], "--held-out-tokens (-1) must be >= 1"),
    (["{one}", "--tiles", "4", "--top-k", "2", "--seed", "-1"], "--seed (-1) must be >= 0 and < 2**32"),
    (["{one}", "--top-k", "2"], "the following arguments are required: --tiles"),
    (["{one}", "--tile", "4", "--top-k", "2"], "unknown option --tile of `trix upcycle`; did you mean --tiles?"),
    (["{dir}/model.onnx", "--tiles", "4", "--top-k", "2"], "`trix upcycle` reads checkpoints: give the .ckpt file"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network of one tile a layer."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "text.txt").write_text(SENTENCE * 30)
    text = TextDataModule(path=folder / "text.txt", context_length=8, batch_size=4, batches_per_epoch=2)
    torch.manual_seed(0)
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=1, d_ff=24, route_on="context")))
    return save_checkpoint(task, text, folder / "one.ckpt")


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gives_one_line_and_no_file(
    arguments: list[str], message: str, one: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"one": one, "lm": checkpoints / "lm.ckpt", "digits": checkpoints / "digits.ckpt", "dir": tmp_path}
    before = {path: path.read_bytes() for path in (one, checkpoints / "lm.ckpt")}
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "a" / "new.ckpt")]
    assert main(["upcycle", *(text.format(**paths) for text in arguments), *output]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("trix: error: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in before} == before


def test_a_code_of_contexts_that_nothing_reads_any_more_goes(one: Path, tmp_path: Path) -> None:
    assert main(["upcycle", str(one), *WHERE, "--output", str(tmp_path / "new.ckpt")]) == 0
    old, new = load_checkpoint(one)[0], load_checkpoint(tmp_path / "new.ckpt")[0]
    assert old.network.context_code is not None
    assert new.network.context_code is None


@pytest.mark.parametrize("part", ["signatures", "optimizer"])
def test_a_file_that_is_not_as_it_should_be_never_gets_its_name(
    part: str, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrongly(checkpoint: dict[str, Any], path: Path) -> None:
        checkpoint = copy.deepcopy(checkpoint)
        if part == "signatures":
            checkpoint["state_dict"]["network.stack.blocks.0.feed_forward.inner.router.balance_bias"][0] += 1
        else:
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 7.0
        torch.save(checkpoint, path)

    monkeypatch.setattr(whole_files, "save", save_wrongly)
    with pytest.raises(RuntimeError, match=r"must read back as it was written, and does not; no file is kept"):
        main(["upcycle", str(one), *WHERE, "--output", str(tmp_path / "a" / "new.ckpt")])
    assert list(tmp_path.iterdir()) == []


def test_the_cut_of_the_whole_is_what_the_checkpoint_computes(one: Path, tmp_path: Path) -> None:
    arguments = ["--tiles", "6", "--top-k", "6", "--text-tokens", "80", "--held-out-tokens", "80"]
    assert main(["upcycle", str(one), *arguments, "--output", str(tmp_path / "new.ckpt")]) == 0
    old, new = load_checkpoint(one)[0].network, load_checkpoint(tmp_path / "new.ckpt")[0].network
    token_BT = torch.arange(24).reshape(3, 8) % old.vocab_size
    expected = old(token_BT).detach()
    torch.testing.assert_close(new(token_BT), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
