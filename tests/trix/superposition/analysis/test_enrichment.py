import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from trix.superposition.analysis import TopTokens, class_enrichment, fisher_enrichment
from trix.superposition.analysis.fisher import Alternative

DOCUMENTS, TOKENS = 300, 20
TITLE_N = np.repeat(np.arange(DOCUMENTS), TOKENS)
LABEL_P = np.arange(DOCUMENTS) % 4


def top_sets(num_latents: int, seed: int, planted: int | None = None) -> list[set[int]]:
    """Latents that fire in bursts: 60 top tokens lie in about 10 documents; with `planted`, of one class, else of any."""
    rng = np.random.default_rng(seed)
    sets = []
    for latent in range(num_latents):
        allowed = np.flatnonzero(LABEL_P == planted) if planted is not None else np.arange(DOCUMENTS)
        documents = rng.choice(allowed, 10 + latent % 3, replace=False)
        sets.append(
            {int(document * TOKENS + token) for document in documents for token in rng.choice(TOKENS, 6, replace=False)}
        )
    return sets


def labels(permuted_by: int | None = None) -> npt.NDArray[np.int64]:
    label_P = LABEL_P if permuted_by is None else np.random.default_rng(permuted_by).permutation(LABEL_P)
    return label_P[TITLE_N]


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_tables_count_documents(alternative: Alternative) -> None:
    sets, label_N = top_sets(15, 0) + top_sets(5, 0, planted=2), labels()
    found = class_enrichment(sets, label_N, TITLE_N, alternative)
    assert found.class_C.tolist() == [0, 1, 2, 3]
    for latent, tokens in enumerate(sets):
        documents = {int(TITLE_N[token]) for token in tokens}
        assert found.num_documents_K[latent] == len(documents)
        for label in range(4):
            hits = sum(int(LABEL_P[document] == label) for document in documents)
            drawn, marked = len(documents), int((LABEL_P == label).sum())
            table = [[hits, drawn - hits], [marked - hits, DOCUMENTS - drawn - marked + hits]]
            expected = stats.fisher_exact(table, alternative=alternative)
            assert found.hits_KC[latent, label] == hits
            np.testing.assert_allclose(found.p_KC[latent, label], expected.pvalue, rtol=1e-9)
            np.testing.assert_allclose(found.odds_ratio_KC[latent, label], expected.statistic)
    np.testing.assert_allclose(found.q_KC, stats.false_discovery_control(found.p_KC, axis=None).reshape(found.p_KC.shape))
    assert found.is_tested_KC.all()


def test_planted_classes_are_found() -> None:
    found = class_enrichment(top_sets(20, 1, planted=3) + top_sets(100, 2), labels(), TITLE_N)
    is_found_KC = found.q_KC <= 0.05
    assert is_found_KC[:20, 3].all()
    assert is_found_KC[20:].sum() <= 2


def test_shuffled_labels_give_discoveries_to_tokens_and_none_to_documents() -> None:
    by_document, by_token = [], []
    for seed in range(6):
        sets, label_N = top_sets(200, seed, planted=0), labels(permuted_by=seed)
        by_document.append(int((class_enrichment(sets, label_N, TITLE_N).q_KC <= 0.05).sum()))
        by_token.append(int((class_enrichment(sets, label_N).q_KC <= 0.05).sum()))
    assert max(by_document) <= 2
    assert min(by_token) > 50


def test_only_documents_count_not_their_numbers_or_tokens() -> None:
    sets = top_sets(10, 3)
    found = class_enrichment(sets, labels(), TITLE_N)
    doubled = [tokens | {token - token % TOKENS for token in tokens} for tokens in sets]
    renumbered = class_enrichment(doubled, labels(), 7 * (DOCUMENTS - TITLE_N))
    for name, values in found._asdict().items():
        np.testing.assert_array_equal(values, getattr(renumbered, name), err_msg=name)


def test_top_tokens_are_taken_as_their_sets_are() -> None:
    idx_KA = torch.tensor([[0, 25, 41], [3, -1, -1], [-1, -1, -1]])
    top = TopTokens(idx_KA, torch.zeros(3, 3))
    label_N, title_N = torch.from_numpy(labels()), torch.from_numpy(TITLE_N)
    found = class_enrichment(top, label_N, title_N)
    for values, expected in zip(found, class_enrichment(list(top), labels(), TITLE_N), strict=True):
        np.testing.assert_array_equal(values, expected)


def test_a_latent_without_documents_is_not_tested() -> None:
    found = class_enrichment([set(), {0}], labels(), TITLE_N)
    assert found.is_tested_KC.tolist() == [[False] * 4, [True] * 4]
    assert (found.p_KC[0] == 1).all()
    assert (found.q_KC[0] == 1).all()
    assert np.isnan(found.odds_ratio_KC[0]).all()


def test_one_class_and_all_documents_are_not_tested() -> None:
    assert not class_enrichment([{0}], np.full(len(TITLE_N), 5), TITLE_N).is_tested_KC.any()
    assert not class_enrichment([range(len(TITLE_N))], labels(), TITLE_N).is_tested_KC.any()


def test_two_classes_have_the_columns_of_the_interface() -> None:
    pytest.importorskip("pandas", reason="fisher_enrichment returns a DataFrame")
    label_N = (labels() == 1).astype(int)
    sets = [*top_sets(8, 4), set()]
    table = fisher_enrichment(sets, label_N, TITLE_N)
    found = class_enrichment(sets, label_N, TITLE_N)
    assert table["latent"].tolist() == list(range(9))
    assert set(table["class"]) == {1}
    assert {"latent", "topK_count", "sports_frac_topK", "odds_ratio", "fisher_p", "q_value", "is_tested"} <= set(table.columns)
    np.testing.assert_array_equal(table["topK_count"], found.num_documents_K)
    np.testing.assert_array_equal(table["fisher_p"], found.p_KC[:, 0])
    np.testing.assert_array_equal(table["sports_frac_topK"][:8], found.hits_KC[:8, 0] / found.num_documents_K[:8])
    assert np.isnan(table["sports_frac_topK"][8])


def test_more_classes_have_a_row_for_each_pair() -> None:
    pytest.importorskip("pandas", reason="fisher_enrichment returns a DataFrame")
    table = fisher_enrichment(top_sets(3, 5), labels(), TITLE_N, alternative="greater")
    found = class_enrichment(top_sets(3, 5), labels(), TITLE_N, alternative="greater")
    assert list(zip(table["latent"], table["class"], strict=True)) == [(k, c) for k in range(3) for c in range(4)]
    assert "sports_frac_topK" not in table
    for column, values in (("fisher_p", found.p_KC), ("q_value", found.q_KC), ("odds_ratio", found.odds_ratio_KC)):
        np.testing.assert_array_equal(table[column], values.ravel(), err_msg=column)


def test_without_pandas_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=re.escape("fisher_enrichment needs pandas: pip install 'trix[superposition]'")):
        fisher_enrichment([{0}], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0, 1]), "top_idx (0 latents) must hold at least 1"),
        (([{0}], []), "labels_global (float64 (0,)) must be int [N] with N >= 1"),
        (([{0}], [0.5, 1.0]), "labels_global (float64 (2,)) must be int [N] with N >= 1"),
        (([{2}], [0, 1]), "indices in top_idx (2) must be < the number of labels (2)"),
        (([{-1}], [0, 1]), "indices in top_idx (-1) must be >= 0"),
        (([{0}], [0, 1], [0]), "title_idx (1,) must have the shape of labels_global (2,)"),
        (([{0}], [0, 1, 1], [7, 7, 8]), "document (7) must have one label; its tokens have 0 and 1"),
    ],
)
def test_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        class_enrichment(*arguments)  # type: ignore[arg-type]
