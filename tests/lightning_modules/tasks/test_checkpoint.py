import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch

from lightning_modules.checkpoint_data import run_data
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import CheckpointError, ClassifierTask, LanguageModelTask, load_checkpoint, read_checkpoint


@pytest.fixture
def saved(language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any, tmp_path: Path) -> Path:
    trainer = make_trainer()
    trainer.fit(language_model, text)
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_checkpoint_rebuilds_the_task(saved: Path, language_model: LanguageModelTask, text: TextDataModule) -> None:
    task, checkpoint = load_checkpoint(saved)
    assert isinstance(task, LanguageModelTask)
    assert not task.training
    assert task.vocabulary == text.vocabulary
    token = torch.arange(8)[None]
    assert torch.equal(task(token), language_model.eval()(token))
    assert checkpoint["trix"] == {
        "task": "language_model",
        "version": 2,
        "data": "TextDataModule",
        "max_steps": 2,
        "task_class": "lightning_modules.tasks.language_model.LanguageModelTask",
        "data_class": "lightning_modules.data.text.TextDataModule",
    }
    assert TextDataModule(**checkpoint["datamodule_hyper_parameters"]).vocabulary == text.vocabulary


def test_classifier_checkpoint_rebuilds_the_task(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(limit_val_batches=1)
    trainer.fit(classifier, digits)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    task, _ = load_checkpoint(tmp_path / "c.ckpt")
    assert isinstance(task, ClassifierTask)
    assert task.class_names == digits.class_names
    image = torch.rand(3, 8, 8)
    assert torch.equal(task(image), classifier.eval()(image))


def test_lightning_loads_it_too(saved: Path, language_model: LanguageModelTask) -> None:
    task = LanguageModelTask.load_from_checkpoint(saved, weights_only=True)
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in language_model.state_dict().items())


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 9)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def _safetensors(path: Path) -> None:
    header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")


def _onnx(path: Path) -> None:
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), path)


def _pickled_object(path: Path) -> None:
    torch.save({"trix": {"version": 1}, "object": L.Trainer}, path)


@pytest.mark.parametrize("write", [_garbage, _zip, _safetensors, _onnx, _pickled_object, Path.touch])
def test_other_files_are_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    write(path)
    with pytest.raises(CheckpointError, match=r"other.ckpt is not a checkpoint that can be loaded safely") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_never_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"trix": {"version": 1}, "bomb": Bomb()}, tmp_path / "zip.ckpt")
    for name in ("plain.ckpt", "zip.ckpt"):
        with pytest.raises(CheckpointError, match="can be loaded safely"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    assert not recwarn.list


def test_truncated_checkpoint_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(saved)


def test_missing_file_and_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nope.ckpt cannot be read: No such file"):
        load_checkpoint(tmp_path / "nope.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


def as_before(checkpoint: dict[str, Any], **changes: Any) -> None:
    """Make it one of before class paths were stored."""
    for name in ("task_class", "data_class"):
        del checkpoint["trix"][name]
    checkpoint["trix"].update(changes)


def test_a_checkpoint_of_before_the_balance_bias_came_to_rest_is_read_and_resumed(
    saved: Path, text: TextDataModule, make_trainer: Any
) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    ages = [name for name in checkpoint["state_dict"] if name.endswith(".balance_age_E")]
    for name in ages:
        del checkpoint["state_dict"][name]
    torch.save(checkpoint, saved)
    task, _ = load_checkpoint(saved)
    state = task.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in checkpoint["state_dict"].items())
    assert [state[name].tolist() for name in ages] == [[0.0] * 4] * 2
    make_trainer(max_steps=4).fit(task.train(), text, ckpt_path=saved, weights_only=True)
    assert all(task.state_dict()[name].min() > 0 for name in ages)


def test_a_checkpoint_without_class_paths_is_read_by_its_names(saved: Path, text: TextDataModule) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    as_before(checkpoint)
    torch.save(checkpoint, saved)
    task, checkpoint = load_checkpoint(saved)
    assert type(task) is LanguageModelTask
    module = run_data(task, checkpoint, saved).module
    assert type(module) is TextDataModule
    assert module.vocabulary == text.vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("trix"), "was not written by `trix fit`"),
        (lambda c: c["trix"].update(version=3), r"version \(3\) must be <= 2"),
        (lambda c: as_before(c, task="poetry"), r"task \('poetry'\) must be one of language_model, classifier"),
        (lambda c: as_before(c, task=["poetry"]), "must be one of language_model, classifier"),
        (
            lambda c: c["trix"].update(task="poetry"),
            r"task \('poetry'\) must be 'language_model', the name of lightning_modules",
        ),
        (lambda c: c["trix"].update(task=["poetry"]), "must be 'language_model', the name of lightning_modules"),
        (lambda c: c.pop("state_dict"), "lacks 'state_dict'"),
        (lambda c: c.pop("pytorch-lightning_version"), "lacks 'pytorch-lightning_version'"),
        (lambda c: c.update(callbacks=5), r"callbacks \(int\) of the checkpoint must be of type dict"),
        (lambda c: c["loops"].update(fit_loop=3), "values of loops of the checkpoint must be of type dict"),
        (lambda c: c["state_dict"].update({3: torch.ones(1)}), "keys of state_dict of the checkpoint must be of type str"),
        (lambda c: c["hyper_parameters"].update(colour="red"), "hyperparameters of the checkpoint do not fit.*colour"),
        (lambda c: c["hyper_parameters"]["network"]["ffn"].update(num_tiles=3), "do not fit the network: size mismatch"),
        (lambda c: c["state_dict"].pop("network.head.weight"), "do not fit the network: Missing key.*network.head.weight"),
        (lambda c: c["state_dict"].update(extra=torch.ones(1)), "do not fit the network: Unexpected key.*extra"),
    ],
)
def test_unfit_checkpoints_are_refused_in_one_line(saved: Path, change: Callable[[Any], object], message: str) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)
