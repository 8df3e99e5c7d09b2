"""Class paths of checkpoints: a class comes back, and all else gives one line that names the file."""

import sys
from pathlib import Path

import pytest

from lightning_modules.class_paths import class_path, import_class
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ClassifierTask, LanguageModelTask, TrixTask
from trix.nn import TriXFFN


@pytest.mark.parametrize("kind", [ClassifierTask, TextDataModule, TriXFFN])
def test_a_path_leads_back_to_its_class(kind: type) -> None:
    assert import_class(class_path(kind), object, "a.ckpt") is kind


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
