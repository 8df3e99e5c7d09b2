"""What a checkpoint keeps of a task or of data must be enough to make it again."""

from typing import Any

import lightning as L
import pytest
import torch

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from lightning_modules.tasks.hyperparameters import check_hyperparameters


class Part(L.LightningDataModule):
    def __init__(self, kept: Any, width: int, noise: float = 0.1, *rest: Any) -> None:
        super().__init__()
        self.save_hyperparameters(kept)


def test_parts_of_ours_can_be_made_again(
    language_model: LanguageModelTask, text: TextDataModule, classifier: ClassifierTask, digits: DigitsDataModule
) -> None:
    for part in (language_model, text, classifier, digits, L.LightningDataModule()):
        check_hyperparameters(part)


VALUES = {"width": 3, "list": [1, "a", None], "dict": {"b": (2.0, True)}}


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ({"kept": VALUES, "width": 3}, None),
        ({"kept": {}, "width": 3, "noise": 0.2}, None),
        ({"kept": {}}, r"^hyperparameters of Part must hold width, so that a checkpoint can rebuild it: self.save"),
        ({"kept": torch.ones(2), "width": 3}, r"^hyperparameter kept of Part \(Tensor\) must be a plain value"),
        ({"kept": {}, "width": len}, r"^hyperparameter width of Part \(builtin_function_or_method\) must be a plain value"),
        ({"kept": {"a": [{3: L.Trainer}]}, "width": 3}, r"^hyperparameter kept of Part \(type\) must be a plain value"),
        ({"kept": {}, "width": 3, "wdith": 4}, r"^hyperparameter wdith of Part must be a parameter of its __init__"),
    ],
)
def test_others_are_told_what_is_missing(kept: dict[str, Any], problem: str | None) -> None:
    part = Part(kept, 3)
    if problem is None:
        check_hyperparameters(part)
        return
    with pytest.raises(UserError, match=problem):
        check_hyperparameters(part)
