from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import MakeTrainer

from lightning_modules.callbacks import PredictionWriter
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.errors import UserError
from lightning_modules.tasks import ClassifierTask


def test_writes_all_predictions_to_one_file(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    output = tmp_path / "folder" / "p.pt"
    batches = make_trainer(callbacks=[PredictionWriter(output)]).predict(classifier, digits)
    written = torch.load(output, weights_only=True)
    assert torch.equal(written["label"], torch.cat([batch["label"] for batch in batches]))
    assert written["probability"].shape == (359, 10)
    assert [path.name for path in output.parent.iterdir()] == ["p.pt"]


def test_predictions_without_a_name_get_one(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ClassifierTask, "predict_step", lambda self, batch: self(batch[0]))
    make_trainer(callbacks=[PredictionWriter(tmp_path / "p.pt")]).predict(classifier, digits)
    written = torch.load(tmp_path / "p.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in written.items()} == {"prediction": (359, 10)}


@pytest.mark.parametrize(("prediction", "kind"), [(3, "int"), ({"a": 3}, "dict"), ({"a": torch.tensor(3)}, "dict")])
def test_predictions_that_are_no_batches_are_refused(
    prediction: Any,
    kind: str,
    classifier: ClassifierTask,
    digits: DigitsDataModule,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(ClassifierTask, "predict_step", lambda *_: prediction)
    with pytest.raises(UserError, match=rf"^predict_step of ClassifierTask \({kind}\) must return a tensor"):
        make_trainer(callbacks=[PredictionWriter(tmp_path / "p.pt")]).predict(classifier, digits)
    assert list(tmp_path.iterdir()) == []
