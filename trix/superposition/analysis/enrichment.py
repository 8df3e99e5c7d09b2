"""Which classes of documents a latent stands for: Fisher's exact test of each latent's top documents.

Legend: N tokens, P documents, K latents, C classes tested, S pairs of a latent and one of its top documents.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trix.superposition.analysis.fisher import Alternative, FloatArray, IntArray, fisher_exact_many
from trix.superposition.analysis.sets import IndexSets, flat_sets

if TYPE_CHECKING:
    import pandas as pd

Integers = npt.ArrayLike | torch.Tensor


class Enrichment(NamedTuple):
    """The tests of K latents against C classes.

    class_C: labels of the classes tested. num_documents_K: documents with at least one top token of the latent. hits_KC: those
    of them that are of the class. odds_ratio_KC: of the sample, ad / bc; inf where bc = 0, NaN without a test. p_KC: p-value.
    q_KC: p-value adjusted over all K C tests by Benjamini and Hochberg; the discoveries at a false discovery rate of 5 % have
    q <= .05. is_tested_KC: False where a margin of the table is empty, as for a latent that never fires; there p is 1.
    """

    class_C: IntArray
    num_documents_K: IntArray
    hits_KC: IntArray
    odds_ratio_KC: FloatArray
    p_KC: FloatArray
    q_KC: FloatArray
    is_tested_KC: npt.NDArray[np.bool_]


def class_enrichment(
    top_idx: IndexSets, labels_global: Integers, title_idx: Integers | None = None, alternative: Alternative = "two-sided"
) -> Enrichment:
    """Test whether the top documents of each latent are of each class more often than documents are (or less often).

    The unit is the document: a latent has the documents in which one of its top tokens lies, and the table of a test counts
    documents. Tokens of one document share its label and much else, so a test that counts tokens takes one document for many
    and makes discoveries in labels that were shuffled. Under labels shuffled between documents the tests here are exact.

    Of two classes the higher label is tested; the test of the other one would say the same. Otherwise all are.

    Args:
        top_idx: of each latent the set of its top tokens, as :func:`~trix.superposition.analysis.topk_sets_per_latent` finds
            them.
        labels_global: class of each token, int [N]; constant within a document.
        title_idx: document of each token, int [N], any numbers. None: each token is a document of its own.
        alternative: "two-sided" or "greater", as in :func:`~trix.superposition.analysis.fisher.fisher_exact_many`.

    Raises:
        ValueError: no latents or no tokens, other numbers of tokens, an index past the last token, or a document with two
            labels.
    """
    label_P, document_N = _documents(labels_global, title_idx)
    num_latents, num_documents = len(top_idx), len(label_P)
    if num_latents == 0:
        raise ValueError("top_idx (0 latents) must hold at least 1")
    latent_S, token_S = flat_sets(top_idx)
    if len(token_S) and token_S.max() >= len(document_N):
        raise ValueError(f"indices in top_idx ({token_S.max()}) must be < the number of labels ({len(document_N)})")
    pairs = np.unique(latent_S * num_documents + document_N[token_S])
    latent_S, document_S = np.divmod(pairs, num_documents)

    class_C, class_P = np.unique(label_P, return_inverse=True)
    num_classes = len(class_C)
    counts = np.bincount(latent_S * num_classes + class_P[document_S], minlength=num_latents * num_classes)
    hits_KC, marked_C = counts.reshape(num_latents, num_classes), np.bincount(class_P)
    drawn_K = hits_KC.sum(axis=1)
    if num_classes == 2:
        class_C, hits_KC, marked_C = class_C[1:], hits_KC[:, 1:], marked_C[1:]

    drawn_K1 = drawn_K[:, None]
    p_KC = fisher_exact_many(hits_KC, drawn_K1, marked_C, num_documents, alternative)
    is_tested_KC = (drawn_K1 > 0) & (drawn_K1 < num_documents) & (marked_C < num_documents)
    return Enrichment(
        class_C,
        drawn_K,
        hits_KC,
        _odds_ratio(hits_KC, drawn_K1, marked_C, num_documents),
        p_KC,
        _false_discovery_control(p_KC),
        is_tested_KC,
    )


def fisher_enrichment(
    top_idx: IndexSets, labels_global: Integers, title_idx: Integers | None = None, alternative: Alternative = "two-sided"
) -> "pd.DataFrame":
    """:func:`class_enrichment` as a table with one row for each latent and class tested, latents first.

    Its columns: latent; class (label); topK_count (top documents); class_frac_topK (share of them that are of the class, NaN
    without any); odds_ratio; fisher_p; q_value; is_tested. With two classes there is one row for each latent, and
    class_frac_topK stands as sports_frac_topK, too: the share of the higher label. Without `title_idx` tokens are counted in
    place of documents, and the p-values are too small.

    Args and Raises: as :func:`class_enrichment`; ImportError without pandas.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("fisher_enrichment needs pandas: pip install 'trix[superposition]'") from error

    found = class_enrichment(top_idx, labels_global, title_idx, alternative)
    num_latents, num_classes = found.hits_KC.shape
    count_K1 = found.num_documents_K[:, None]
    frac_KC = np.divide(found.hits_KC, count_K1, out=np.full(found.hits_KC.shape, np.nan), where=count_K1 > 0)
    table = {
        "latent": np.repeat(np.arange(num_latents), num_classes),
        "class": np.tile(found.class_C, num_latents),
        "topK_count": np.repeat(found.num_documents_K, num_classes),
        "class_frac_topK": frac_KC.ravel(),
        "odds_ratio": found.odds_ratio_KC.ravel(),
        "fisher_p": found.p_KC.ravel(),
        "q_value": found.q_KC.ravel(),
        "is_tested": found.is_tested_KC.ravel(),
    }
    if len(np.unique(np.asarray(labels_global))) == 2:
        table["sports_frac_topK"] = frac_KC.ravel()
    return pd.DataFrame(table)


def _documents(labels_global: Integers, title_idx: Integers | None) -> tuple[IntArray, IntArray]:
    """(label_P, document_N): documents numbered from 0 in the order of `title_idx`."""
    label_N = np.asarray(labels_global)
    if label_N.ndim != 1 or len(label_N) == 0 or label_N.dtype.kind not in "iub":
        raise ValueError(f"labels_global ({label_N.dtype} {label_N.shape}) must be int [N] with N >= 1")
    if title_idx is None:
        return label_N.astype(np.int64), np.arange(len(label_N))
    title_N = np.asarray(title_idx)
    if title_N.shape != label_N.shape:
        raise ValueError(f"title_idx {title_N.shape} must have the shape of labels_global {label_N.shape}")
    title_P, first_P, document_N = np.unique(title_N, return_index=True, return_inverse=True)
    label_P = label_N[first_P].astype(np.int64)
    is_other_N = label_P[document_N] != label_N
    if is_other_N.any():
        token = int(np.flatnonzero(is_other_N)[0])
        document = document_N[token]
        raise ValueError(
            f"document ({title_P[document]}) must have one label; its tokens have {label_P[document]} and {label_N[token]}"
        )
    return label_P, document_N


def _odds_ratio(hits_KC: IntArray, drawn_K1: IntArray, marked_C: IntArray, num_total: int) -> FloatArray:
    hits, drawn, marked = (np.asarray(part, dtype=np.float64) for part in (hits_KC, drawn_K1, marked_C))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 just where a margin is empty
        return hits * (num_total - drawn - marked + hits) / ((drawn - hits) * (marked - hits))


def _false_discovery_control(p_KC: FloatArray) -> FloatArray:
    from scipy.stats import false_discovery_control  # scipy.stats takes a second to load

    q_KC: FloatArray = false_discovery_control(p_KC, axis=None).reshape(p_KC.shape)
    return q_KC
