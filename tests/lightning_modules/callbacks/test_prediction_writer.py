from pathlib import Path

import torch
from small_runs import MakeTrainer

from lightning_modules.callbacks import PredictionWriter
from lightning_modules.data.digits import DigitsDataModule
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
