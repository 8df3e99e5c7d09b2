"""The figures of several autoencoders on one dump: the parts do not mix, labels are asked of documents, nothing dead passes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_dumps import VOCABULARY, ragged_frame, trix_backend

from trix.superposition.config import DumpConfig
from trix.superposition.dump import ActivationDump, dump_sites, reader
from trix.superposition.evaluation.measure import EvaluationData, Split, evaluation_data, measure
from trix.superposition.evaluation.token_rows import TokenRows
from trix.superposition.sae import SAE, TopKSAE, Transcoder


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_ROWS", 32)
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, small_chunks: None) -> Split:
    """Texts of two classes, whose letters tell the class."""
    frames = [ragged_frame(200, 30, seed, letters) for seed, letters in enumerate(("abcd ", "aefg "))]
    frame = pd.concat([frame.assign(topic=label) for label, frame in enumerate(frames)], ignore_index=True)
    config = DumpConfig(max_len=40, batch_size=16, shard_tokens=1000, dtype="fp32")
    sites, folder = ["resid_pre.1", "ffn_out.1"], tmp_path_factory.mktemp("dump")
    first, second = dump_sites(frame, "title", "topic", trix_backend(), config, sites, folder).values()
    return Split(ActivationDump(first), ActivationDump(second), 0.3, 0)


@pytest.fixture(scope="module")
def data(split: Split) -> EvaluationData:
    return evaluation_data(Split(split.dump, None, split.held_out, split.seed), VOCABULARY)


def fitting_sae(data: EvaluationData) -> SAE:
    """Latents are the coordinates and their negatives: nothing is lost."""
    width = data.x_ND.shape[1]
    sae = TopKSAE(width, 2 * width, active=2 * width)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    sae.set_weights(both.t().contiguous(), torch.zeros(2 * width), both, torch.zeros(width))
    return sae


def test_training_and_held_out_documents_do_not_mix(data: EvaluationData) -> None:
    probes = data.questions[0].probes
    held_out = set(TokenRows.joined(data.split.held_out_rows()).document_N.tolist())
    assert held_out == set(data.documents_P.tolist())
    assert set(probes.document_U[probes.is_test_U].tolist()) == held_out
    assert not held_out & set(probes.document_U[~probes.is_test_U].tolist())
    assert (~probes.is_test_U).sum() > 500


def test_questions_are_about_tokens_and_about_labels_of_documents(data: EvaluationData) -> None:
    assert data.names == ["next: vowel", "next: white space", "previous: vowel", "third letter or later", "label: 1"]
    assert data.left_out == ["line after an empty one", "next: capital"]
    of_documents = data.questions[1].probes
    assert len(of_documents.x_UD) == len(np.unique(of_documents.document_U))
    labels = dict(zip(data.split.dump.column("titleidx").tolist(), data.split.dump.column("labels").tolist(), strict=True))
    expected = [labels[document] for document in of_documents.document_U.tolist()]
    assert of_documents.answers["label: 1"].tolist() == expected
    assert data.dense_hits.accuracy()[-1, 0] > 0.9


def test_figures_are_of_the_held_out_tokens(data: EvaluationData) -> None:
    torch.manual_seed(0)
    random = TopKSAE(data.x_ND.shape[1], 64, active=4)
    found = measure(data, {"fitting": fitting_sae(data), "random": random})
    rows = TokenRows.joined(data.split.held_out_rows())
    with torch.no_grad():
        x_hat, z = random(rows.x_ND)
    error, around = (rows.x_ND - x_hat).double().square().sum(), (rows.x_ND - rows.x_ND.mean(dim=0)).double().square().sum()
    assert found["random"].core["explained_variance"] == pytest.approx(float(1 - error / around), abs=1e-5)
    assert found["random"].errors.explained_variance == pytest.approx(found["random"].core["explained_variance"], abs=1e-9)
    assert found["random"].core["active"] == pytest.approx(float((z > 0).sum() / len(z)))
    some = int(data.documents_P[3])
    of_document = (rows.x_ND - x_hat)[rows.document_N == some].double().square().sum()
    assert found["random"].errors.error_P[3] == pytest.approx(float(of_document), rel=1e-5)
    assert found["fitting"].core["explained_variance"] == pytest.approx(1.0, abs=1e-6)
    assert found["fitting"].hits.hit_PQS2.shape == (len(data.documents_P), 5, 3, 2)
    assert found["random"].latents.keys() == set(data.names)
    assert len(found["fitting"].perturbations) == 2


def test_a_transcoder_is_measured_by_what_it_writes(split: Split) -> None:
    data = evaluation_data(split, VOCABULARY)
    width = data.x_ND.shape[1]
    torch.manual_seed(0)
    sae = Transcoder(width, 64, active=4, d_out=width)
    with torch.no_grad():
        sae.b_dec.copy_(data.mean_O)
        sae.W_dec.zero_()
    found = measure(data, {"run": sae})["run"]
    assert found.core["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # it writes the mean of the targets
    assert found.perturbations == []
    assert found.targeted is None


def test_too_little_is_one_line(split: Split, data: EvaluationData, tmp_path: Path) -> None:
    dead = TopKSAE(data.x_ND.shape[1], 64, active=4)
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match=r"latents of run that are active at held-out tokens \(0 of 64\) must be >= 1"):
        measure(data, {"run": dead})
    one_chunk = [Split(split.dump, None, 0.004, seed) for seed in range(20)]
    few = next(of for of in one_chunk if len(TokenRows.joined(of.held_out_rows()).document_N.unique()) < 8)
    with pytest.raises(ValueError, match=r"held-out documents \([1-7]\) must be >= 8"):
        evaluation_data(few, VOCABULARY)
    frame = pd.DataFrame({"title": ["bcdf"] * 60, "topic": 0})
    config = DumpConfig(max_len=4, batch_size=16, shard_tokens=1000, dtype="fp32")
    folder = next(iter(dump_sites(frame, "title", "topic", trix_backend(), config, ["resid_pre.1"], tmp_path).values()))
    with pytest.raises(ValueError, match=r"questions with at least 20 cases .* \(0 of 6\), must be >= 1"):
        evaluation_data(Split(ActivationDump(folder), None, 0.3, 0), VOCABULARY)
