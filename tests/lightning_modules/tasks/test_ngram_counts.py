"""The n-grams of what a task was trained on: whose batches, without padding, and none where no n-grams are read."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.data.data_module import RunData
from lightning_modules.errors import DataError
from lightning_modules.tasks import ClassifierTask
from lightning_modules.tasks.ngram_counts import count_training_text
from trix.introspection import NgramReader, TriXIntrospector, html_report
from trix.introspection.ngrams import count_ngrams, routes_on_context
from trix.nn import ClassifierConfig, FFNConfig

VOCABULARY = "\0\N{REPLACEMENT CHARACTER} abc"
TRAINING = torch.tensor([[3, 4, 5, 0], [4, 3, 4, 3], [5, 0, 0, 0]])
VALIDATION = torch.tensor([[5, 5, 0, 0]])


def task(route_on: str = "context") -> ClassifierTask:
    torch.manual_seed(0)
    ffn = FFNConfig(num_tiles=4, route_on=route_on)  # type: ignore[arg-type]
    return ClassifierTask(None, 2, network=ClassifierConfig(16, 1, 2, context_length=4, ffn=ffn), vocabulary=VOCABULARY)


def data_of(training: torch.Tensor) -> RunData:
    sets = [TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)) for x in (training, VALIDATION)]
    return RunData(lambda: L.LightningDataModule.from_datasets(*sets))


def test_a_classifier_counts_its_training_texts_without_padding() -> None:
    classifier = task()
    counted = classifier.page(data_of(TRAINING), 100).counted
    assert counted is not None
    assert counted.source == "training text"
    found = {
        counted.written(ids): n for ids, n in zip(counted.ngrams.id_NJ.tolist(), counted.ngrams.count_N.tolist(), strict=True)
    }
    assert found == {"⊢a": 1, "ab": 2, "bc": 1, "⊢b": 1, "ba": 2, "⊢c": 1}


def test_the_page_of_a_classifier_predicts_its_usage() -> None:
    classifier = task().eval()
    page = classifier.page(data_of(VALIDATION), 100)
    text = html_report(page.network, page.inputs, page.tokens, labels=page.labels, counted=page.counted)
    assert "n-grams of 2 tokens (training text) is at most 0.0 points off, from those of the sample itself 0.0." in text
    rates = NgramReader(page.network).claims(count_ngrams(VALIDATION, 2, VALIDATION != 0)).rates()
    measured = TriXIntrospector(page.network).routing_distribution(VALIDATION)
    torch.testing.assert_close(rates, measured.double(), atol=1e-6, rtol=0.0)


def test_without_training_batches_those_of_the_validation_are_counted() -> None:
    class HeldOutAlone(L.LightningDataModule):
        def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
            return DataLoader(TensorDataset(VALIDATION))

    classifier = task()
    counted = count_training_text(classifier.network, RunData(HeldOutAlone), ["", *VOCABULARY[1:]], 4, padding_token=0)
    assert counted is not None
    assert counted.ngrams.count_N.sum() == 2


def test_a_network_that_reads_no_ngrams_asks_for_no_training_data() -> None:
    def make() -> L.LightningDataModule:
        raise AssertionError

    embedding = task("embedding")
    assert not routes_on_context(embedding.network)
    assert count_training_text(embedding.network, RunData(make), VOCABULARY, 4) is None


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match=r"token ids of the data \(3 to 6\) must be >= 0 and < characters of the voc"):
        task().page(data_of(torch.tensor([[3, 6]])), 100)
