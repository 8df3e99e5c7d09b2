"""Probes of latents: planted answers are found by the latent that holds them, on documents that were held out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import balanced_accuracy_score
from small_autoencoders import SETTINGS, small_autoencoder

from trix.superposition.analysis import mean_pool_by_title
from trix.superposition.evaluation.probing import (
    MIN_CASES,
    Hits,
    ProbeSet,
    dense_probes,
    document_means,
    perturbation,
    sparse_latents,
    sparse_probes,
)
from trix.superposition.sae import TopKSAE

NUM_DOCUMENTS, LENGTH, WIDTH = 60, 20, 12


def planted(seed: int = 0) -> tuple[ProbeSet, csr_matrix, TopKSAE]:
    """Latent j is coordinate j. Questions: whether latent 3 is active, whether latent 5 is, and one that nothing answers."""
    generator = np.random.default_rng(seed)
    num_units = NUM_DOCUMENTS * LENGTH
    z_UK = np.where(generator.random((num_units, WIDTH)) < 0.3, generator.uniform(1, 2, (num_units, WIDTH)), 0)
    sae = TopKSAE(WIDTH, WIDTH, active=5)
    sae.set_weights(torch.eye(WIDTH), torch.zeros(WIDTH), torch.eye(WIDTH), torch.zeros(WIDTH))
    answers = {f"latent {j}": (z_UK[:, j] > 0).astype(np.int8) for j in (3, 5)}
    answers["nothing"] = generator.integers(0, 2, num_units).astype(np.int8)
    document_U = np.repeat(generator.permutation(NUM_DOCUMENTS) * 7, LENGTH)
    probes = ProbeSet(z_UK.astype(np.float32), document_U, document_U >= 280, answers)
    return probes, csr_matrix(z_UK.astype(np.float32)), sae


def test_a_latent_that_holds_the_answer_is_chosen_and_answers() -> None:
    probes, z_UK, _ = planted()
    found = sparse_probes(probes, z_UK)
    assert found.latent_QS[:2, 0].tolist() == [3, 5]
    accuracy_QS = found.hits.accuracy()
    assert accuracy_QS[:2].min() > 0.99
    assert abs(accuracy_QS[2] - 0.5).max() < 0.08
    assert dense_probes(probes).hits.accuracy()[:2].min() > 0.95


def test_what_is_learned_is_of_training_documents_alone() -> None:
    """Turned round in the test documents, answers are all wrong."""
    probes, z_UK, _ = planted()
    turned = {name: np.where(probes.is_test_U, 1 - answer, answer) for name, answer in probes.answers.items()}
    found = sparse_probes(ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, turned), z_UK)
    assert found.latent_QS[:2, 0].tolist() == [3, 5]
    assert found.hits.accuracy()[:2].max() < 0.01


def test_open_questions_do_not_count() -> None:
    probes, z_UK, _ = planted()
    generator = np.random.default_rng(1)
    is_open = generator.random(len(probes.x_UD)) < 0.5
    some = {name: np.where(is_open, -1, answer) for name, answer in probes.answers.items()}
    found = sparse_probes(ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, some), z_UK)
    assert found.hits.case_PQ2[:, 0].sum() == (probes.is_test_U & ~is_open).sum()
    assert found.hits.accuracy()[:2].min() > 0.99


def test_dense_probes_are_of_activations_as_they_are() -> None:
    probes, _, _ = planted()
    dense = dense_probes(probes)
    says_yes = probes.x_UD[probes.is_test_U] @ dense.weight_QD[0] + dense.bias_Q[0] > 0
    truth = probes.answers["latent 3"][probes.is_test_U]
    assert dense.hits.accuracy()[0, 0] == pytest.approx(balanced_accuracy_score(truth, says_yes))


def test_removing_latents_hurts_the_question_that_they_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trix.superposition.evaluation.probing.NUM_REMOVED", 1)
    probes, z_UK, sae = planted()
    kept = ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, dict(list(probes.answers.items())[:2]))
    found = perturbation(kept, z_UK, sae, dense_probes(kept))
    assert found.own == pytest.approx(0.5, abs=0.05)  # to chance
    assert found.others == pytest.approx(0.0, abs=0.02)
    assert found.targeted == found.own - found.others
    alone = ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, {"latent 3": probes.answers["latent 3"]})
    assert np.isnan(perturbation(alone, z_UK, sae, dense_probes(alone)).others)


def test_a_random_dictionary_takes_from_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trix.superposition.evaluation.probing.NUM_REMOVED", WIDTH)
    probes, _, _ = planted()
    torch.manual_seed(0)
    random = TopKSAE(WIDTH, WIDTH, active=WIDTH)
    z_UK = sparse_latents(random, torch.from_numpy(probes.x_UD))
    kept = ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, dict(list(probes.answers.items())[:2]))
    assert perturbation(kept, z_UK, random, dense_probes(kept)).targeted < 0.3  # all is removed, of every question


@pytest.mark.parametrize("name", SETTINGS)
def test_sparse_latents_are_those_of_encode(name: str) -> None:
    sae = small_autoencoder(name).eval()
    x = torch.randn(50, sae.d_model)
    with torch.no_grad():
        assert np.allclose(sparse_latents(sae, x).toarray(), sae.encode(x).numpy(), atol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_means_of_documents(documents: list[int]) -> None:
    document_N = np.array(documents)
    rows = np.random.default_rng(0).normal(size=(len(documents), 3)).astype(np.float32)
    found, pool = document_means(document_N)
    assert found.tolist() == sorted(set(documents))
    assert np.allclose(pool @ rows, mean_pool_by_title(rows, document_N), atol=1e-5)


def test_documents_that_are_drawn_count_as_often_as_they_are_drawn() -> None:
    probes, z_UK, _ = planted()
    hits = sparse_probes(probes, z_UK).hits
    num = len(hits.hit_PQS2)
    drawn = np.random.default_rng(0).integers(0, num, (3, num))
    weight = np.stack([np.bincount(row, minlength=num) for row in drawn]).astype(float)
    expected = [Hits(hits.hit_PQS2[row], hits.case_PQ2[row]).accuracy() for row in drawn]
    assert np.allclose(hits.accuracy(weight), expected)
    joined = Hits.joined([hits, hits])
    assert np.allclose(joined.accuracy(), np.concatenate([hits.accuracy()] * 2))


def test_questions_with_few_cases_or_documents_are_left_out() -> None:
    probes, _, _ = planted()
    one_document = (probes.document_U == probes.document_U[0]).astype(np.int8)
    few = np.zeros(len(probes.x_UD), dtype=np.int8)
    few[np.flatnonzero(probes.is_test_U)[: 20 * LENGTH]] = 1  # enough in test, none in training
    rare = np.zeros(len(probes.x_UD), dtype=np.int8)
    for is_part in (probes.is_test_U, ~probes.is_test_U):
        rare[np.flatnonzero(is_part)[:: is_part.sum() // (MIN_CASES - 2)][: MIN_CASES - 1]] = 1
    asked = {**probes.answers, "one document": one_document, "few": few, "rare": rare}
    usable = ProbeSet(probes.x_UD, probes.document_U, probes.is_test_U, asked).usable()
    assert usable.answers.keys() == probes.answers.keys()


def test_fewer_latents_than_a_probe_reads_are_refused() -> None:
    probes, z_UK, _ = planted()
    with pytest.raises(ValueError, match=r"k of the autoencoder \(4\) must be >= latents of a probe \(5\)"):
        sparse_probes(probes, z_UK[:, :4])
