import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import save_checkpoint

from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import CheckpointError, ClassifierTask, LanguageModelTask
from lightning_modules.tasks.hub import load_pretrained
from trix.nn import routed_layers

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def folder(language_model: LanguageModelTask, tmp_path: Path) -> Path:
    routed_layers(language_model.network)[0].freeze_signature(1, tag="mine")
    language_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_language_model_comes_back_as_it_was(folder: Path, language_model: LanguageModelTask) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    task = LanguageModelTask.from_pretrained(folder)
    assert not task.training
    assert task.hparams == language_model.hparams
    expected = language_model.state_dict()
    assert task.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in task.state_dict().items())
    assert routed_layers(task.network)[0].get_surgery_history()[-1]["tag"] == "mine"
    token_BT = torch.arange(8)[None]
    assert torch.equal(task(token_BT), language_model.eval()(token_BT))
    assert task.network.head.weight is task.network.embedding.weight


def test_a_classifier_comes_back_as_it_was(classifier: ClassifierTask, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path)
    task = load_pretrained(tmp_path)
    assert isinstance(task, ClassifierTask)
    assert task.class_names == classifier.class_names
    image = torch.rand(3, 8, 8)
    assert torch.equal(task(image), classifier.eval()(image))


def test_files_are_as_readable_as_any_other(folder: Path) -> None:
    (folder / "other").touch()
    modes = {(folder / name).stat().st_mode for name in (CONFIG, WEIGHTS, "other")}
    assert len(modes) == 1


def test_weights_that_are_not_finite_are_not_written(language_model: LanguageModelTask, tmp_path: Path) -> None:
    with torch.no_grad():
        language_model.network.norm.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"weight norm.weight must be finite: it is nan at \[3\]"):
        language_model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_task_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(LanguageModelTask\) must be a ClassifierTask"):
        ClassifierTask.from_pretrained(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("trix"), "was not written by save_pretrained"),
        (lambda c: c.update(hyper_parameters=[]), "was not written by save_pretrained"),
        (lambda c: c["trix"].update(version=99), r"version \(99\) must be 2"),
        (lambda c: c["trix"].update(task_class="os.system"), "os"),
        (lambda c: c["trix"].update(task_class="own.Task"), "--trust own"),
        (lambda c: c["trix"].update(task="classifier"), r"task \('classifier'\) must be 'language_model'"),
        (lambda c: c["hyper_parameters"]["network"].update(num_layers=10**9), r"num_layers \(1000000000\) must equal"),
        (lambda c: c["hyper_parameters"]["network"].update(d_model=10**6), "do not fit the network: size mismatch"),
        (lambda c: c["hyper_parameters"]["network"].update(colour=1), "do not fit"),
        (lambda c: c["hyper_parameters"]["network"]["ffn"].update(routing="own.Router"), "--trust own"),
    ],
)
def test_a_configuration_is_checked(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", pickle.dumps({})):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.safetensors must be a safetensors file"):
            load_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        load_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_pretrained(folder)


def test_weights_must_be_those_of_the_configuration(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = "network.norm.weight"
    for changed in ({**weights, name: weights[name][:-1].clone()}, {**weights, name: weights[name].to(torch.complex64)}):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"norm\.weight"):
            load_pretrained(folder)


def test_without_huggingface_hub_only_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"nobody/model must be a folder; a repository of the Hub needs pip install"):
        load_pretrained("nobody/model")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it is a file"):
        load_pretrained(tmp_path / "file")


def test_push_to_hub_uploads_the_folder(language_model: LanguageModelTask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **settings: Any) -> SimpleNamespace:
            seen["made"] = (repo_id, settings)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            seen["uploaded"] = (repo_id, sorted(path.name for path in Path(folder_path).iterdir()), commit_message)
            return "address"

    stub = ModuleType("huggingface_hub")
    stub.HfApi = Api  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    assert language_model.push_to_hub("model", private=True, token="t", commit_message="first") == "address"
    assert seen == {
        "token": "t",
        "made": ("model", {"private": True, "exist_ok": True}),
        "uploaded": ("me/model", [CONFIG, WEIGHTS], "first"),
    }
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="push_to_hub needs huggingface_hub"):
        language_model.push_to_hub("model")


def test_the_real_library_says_that_it_is_offline(language_model: LanguageModelTask, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="push_to_hub needs huggingface_hub")
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/no-model must be a folder or a repository of the Hub"):
        load_pretrained("nobody/no-model")
    with pytest.raises(errors.OfflineModeIsEnabled):
        language_model.push_to_hub("nobody/no-model", token="none")


def test_the_card_tells_training_surgery_parity_and_limits(
    language_model: LanguageModelTask, text: TextDataModule, tmp_path: Path
) -> None:
    from lightning_modules.commands.export import run_export

    routed_layers(language_model.network)[1].freeze_signature(2, tag="a | <b>")
    ckpt = save_checkpoint(language_model, text, tmp_path / "saved.ckpt")
    arguments = ["--ckpt", str(ckpt), "--hub-folder", str(tmp_path / "hub")]
    assert run_export(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["README.md", CONFIG, "model.onnx", WEIGHTS]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trix\n")
    assert "pipeline_tag: text-generation" in card
    assert text.text_sha256 in card
    assert r"- layer 1, tile 2: freeze after 0 batches (a \| \<b\>)" in card
    assert "routed the same 100.00%" in card
    assert "## Limits" in card
    task = load_pretrained(tmp_path / "hub")
    token_BT = torch.arange(8)[None]
    assert torch.equal(task(token_BT), language_model.eval()(token_BT))
    with pytest.raises(UserError, match="must be empty or not exist yet: no folder is replaced"):
        run_export(arguments)
    for wrong in ([], ["--output", "a.onnx", "--hub-folder", "b"]):
        with pytest.raises(UserError, match="one of --output FILE and --hub-folder FOLDER must be given"):
            run_export(["--ckpt", str(ckpt), *wrong])
