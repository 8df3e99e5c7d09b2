"""Class paths of checkpoints: a class comes back, and all else gives one line that names the file."""

import sys
from pathlib import Path

import pytest
from lightning import LightningDataModule

from lightning_modules.class_paths import class_path, import_class, import_parts, part_paths
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ClassifierTask, LanguageModelTask, TrixTask
from trix.nn import TriXFFN


@pytest.mark.parametrize("kind", [ClassifierTask, TextDataModule, TriXFFN])
def test_a_path_leads_back_to_its_class(kind: type) -> None:
    assert import_class(class_path(kind), object, "a.ckpt", package=kind.__module__.split(".")[0]) is kind


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("os.system", "is in Python's standard library"),
        ("__main__.Task", "was defined in a script"),
        ("own.tasks.Task", "add --trust own$"),
        ("trix2.Task", "add --trust trix2$"),
        ("LanguageModelTask", r"class path \('LanguageModelTask'\) must name a class of a module"),
        ("", r"class path \(''\) must name"),
        (None, r"class path \(None\) must name"),
        ("lightning_modules..Task", "must name a class of a module"),
        ("lightning_modules.tasks.Nothing", "cannot be imported: AttributeError"),
        ("lightning_modules.nothing.Task", "cannot be imported: ModuleNotFoundError"),
        ("lightning_modules.tasks.load_checkpoint", "must be a class derived from lightning_modules.tasks.task.TrixTask"),
        ("torch.nn.Linear", "must be in lightning_modules; if you trust it, add --trust torch$"),
        ("lightning.pytorch.demos.boring_classes.BoringModel", "must be in lightning_modules; if you trust it, add --trust"),
        ("trix.nn.TriXFFN", "must be in lightning_modules"),
        ("lightning_modules.tasks.TrixTask", "must be a class derived from lightning_modules.tasks.task.TrixTask"),
        ("lightning_modules.tasks.RoutedTask", "must have no abstract methods, it has predict_step"),
        ("lightning_modules.data.text.TextDataModule", "must be a class derived from lightning_modules.tasks.task.TrixTask"),
    ],
)
def test_any_other_path_is_refused(path: object, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        import_class(path, TrixTask, "a.ckpt")
    assert "a.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trust_is_for_a_module_and_those_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_a").mkdir()
    text = "from lightning_modules.tasks import LanguageModelTask\nclass Task(LanguageModelTask): ...\n"
    for name in ("package_a/__init__", "package_a/tasks", "package_a/tasks2"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("package_a.Task", "package_a.tasks2.Task"):
        with pytest.raises(UserError, match="add --trust package_a"):
            import_class(path, TrixTask, "a.ckpt", ["package_a.tasks"])
    assert "package_a" not in sys.modules
    assert issubclass(import_class("package_a.tasks.Task", TrixTask, "a.ckpt", ["package_a.tasks"]), LanguageModelTask)
    assert issubclass(import_class("package_a.tasks2.Task", TrixTask, "a.ckpt", ["package_a"]), LanguageModelTask)


def test_torch_and_lightning_are_trusted_like_any_other_module() -> None:
    path = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    assert class_path(import_class(path, LightningDataModule, "a.ckpt", ["lightning"])) == path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"network": {"num_layers": 1, "mixer": "own.Mixer", "ffn": {"num_tiles": 2, "tiles": "own.Tiles"}}}, 2),
        ({"any_name": {"num_tiles": 2, "routing": "own.Router"}}, 1),
        ({"network": {"num_layers": 1, "mixer": "attention"}}, 0),
        ({"tiles": "sprites.png", "mixer": "desk.wav", "routing": "a.b"}, 0),  # settings of a task of the user's own
        ({"network": {"num_layers": 1, "tiles": "sprites.png"}}, 0),
        ({"num_tiles": 2, "tiles": 5}, 0),
        (None, 0),
    ],
)
def test_parts_are_looked_for_in_settings_of_our_networks(settings: object, expected: int) -> None:
    assert len(list(part_paths(settings))) == expected
    if expected:
        with pytest.raises(UserError, match=r"own\..* add --trust own$"):
            import_parts(settings, "a.ckpt")
    else:
        import_parts(settings, "a.ckpt")


def test_a_part_is_of_trix_or_of_a_module_that_is_trusted() -> None:
    settings = {"num_tiles": 2, "tiles": "torch.utils.benchmark.Timer"}
    with pytest.raises(UserError, match=r"Timer .* must be in trix; if you trust it, add --trust torch"):
        import_parts(settings, "a.ckpt")
    assert "torch.utils.benchmark" not in sys.modules
