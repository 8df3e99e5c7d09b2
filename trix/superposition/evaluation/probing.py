"""What single latents tell: probes that read one, two or five of them, beside a probe that reads all activations.

Shapes: U units (tokens, or documents with the means of their tokens), D width, K latents, Q questions, S numbers of latents,
P documents.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from trix.superposition.evaluation.targets import Answers
from trix.superposition.sae import SAE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_LATENTS = (1, 2, 5)
NUM_REMOVED = 20  # latents that the perturbation of a question sets to 0
MIN_CASES = 20  # units of each answer, in training and in test
MIN_DOCUMENTS = 5  # in which each answer occurs, in training and in test
ROWS = 4096


@dataclass(frozen=True)
class ProbeSet:
    """Units and the questions about them.

    Attributes:
        x_UD: float32. document_U: number of the document of each unit, int64. is_test_U: units of held-out documents.
        answers: int8 [U] by question: 1 yes, 0 no, -1 not known.
    """

    x_UD: NDArray[np.float32]
    document_U: Ints
    is_test_U: NDArray[np.bool_]
    answers: dict[str, Answers]

    def usable(self) -> Self:
        """The same with the questions that have at least MIN_CASES units of each answer, in MIN_DOCUMENTS documents, both in
        training and in test."""
        kept = {name: answer_U for name, answer_U in self.answers.items() if self._is_usable(answer_U)}
        return type(self)(self.x_UD, self.document_U, self.is_test_U, kept)

    def _is_usable(self, answer_U: Answers) -> bool:
        for is_part_U in (self.is_test_U, ~self.is_test_U):
            for answer in (0, 1):
                is_case_U = is_part_U & (answer_U == answer)
                if is_case_U.sum() < MIN_CASES or len(np.unique(self.document_U[is_case_U])) < MIN_DOCUMENTS:
                    return False
        return True


@dataclass(frozen=True)
class Hits:
    """How often probes were right, counted by document, so that documents can be drawn anew.

    hit_PQS2: float64 [P, Q, S, 2], right answers where the truth is no and yes. case_PQ2: [P, Q, 2], all of these cases.
    """

    hit_PQS2: Floats
    case_PQ2: Floats

    @classmethod
    def joined(cls, parts: Sequence["Hits"]) -> Self:
        """The questions of several parts, of the same documents, one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("hit_PQS2", "case_PQ2")))

    def accuracy(self, weight_RP: Floats | None = None) -> Floats:
        """Balanced accuracy, the mean of the shares of right answers among the cases of no and of yes: [Q, S].

        weight_RP: how often each document counts, in each of R draws: [R, Q, S].
        """
        if weight_RP is None:
            return self.accuracy(np.ones((1, len(self.hit_PQS2))))[0]
        hit_RQS2, case_RQ2 = np.tensordot(weight_RP, self.hit_PQS2, 1), np.tensordot(weight_RP, self.case_PQ2, 1)
        with np.errstate(invalid="ignore"):  # a draw may lack an answer
            share_RQS2: Floats = hit_RQS2 / case_RQ2[:, :, None]
        return np.nanmean(share_RQS2, axis=-1)


@dataclass(frozen=True)
class DenseProbes:
    """A linear probe of activations for each question. weight_QD, bias_Q: of activations as they are. hits: with S = 1."""

    weight_QD: Floats
    bias_Q: Floats
    hits: Hits


@dataclass(frozen=True)
class SparseProbes:
    """Probes that read a few latents. latent_QS: the latents of each question, the one that tells most first. hits: S is that
    of NUM_LATENTS."""

    latent_QS: Ints
    hits: Hits


@dataclass(frozen=True)
class Perturbation:
    """What the dense probes lose when the latents of a question are set to 0.

    own: mean fall of balanced accuracy at the questions whose latents were removed. others: the same at the other questions,
    nan where there is one alone.
    """

    own: float
    others: float

    @property
    def targeted(self) -> float:
        """own - others: 0 where latents are about everything alike."""
        return self.own - self.others


def sparse_latents(sae: SAE, x_UD: Tensor) -> csr_matrix:
    """z, float32 [U, K], with the active latents alone in memory."""
    values, latents, lengths = [], [], []
    with torch.no_grad():
        for rows_ND in torch.split(x_UD, ROWS):
            code = sae.code(rows_ND)
            values.append(code.value_M.float())
            latents.append(code.latent_M)
            lengths.append(code.offset_N1.diff())
    offset = np.concatenate([[0], torch.cat(lengths).cumsum(0).numpy()])
    return csr_matrix((torch.cat(values).numpy(), torch.cat(latents).numpy(), offset), shape=(len(x_UD), sae.k))


def document_means(document_N: Ints) -> tuple[Ints, csr_matrix]:
    """The documents in order, int64 [P], and the matrix [P, N] that takes the mean over the rows of each."""
    documents, place_N, counts = np.unique(document_N, return_inverse=True, return_counts=True)
    share_N = (1 / counts)[place_N].astype(np.float32)
    return documents, csr_matrix((share_N, (place_N, np.arange(len(document_N)))), shape=(len(documents), len(document_N)))


def dense_probes(probes: ProbeSet) -> DenseProbes:
    """A logistic regression on all activations, for each question: what they tell at most in a linear way."""
    mean_D, scale_D = _standard(probes.x_UD[~probes.is_test_U])
    scaled_UD = (probes.x_UD - mean_D) / scale_D
    weights, biases, right = [], [], []
    for answer_U in probes.answers.values():
        weight_D, bias = _fitted(scaled_UD, answer_U, probes.is_test_U)
        weight_D = weight_D / scale_D
        weights.append(weight_D)
        biases.append(bias - float(weight_D @ mean_D))
        right.append([_says_yes(probes.x_UD, weight_D, biases[-1])])
    return DenseProbes(np.array(weights), np.array(biases), _hits(probes, right))


def sparse_probes(probes: ProbeSet, z_UK: csr_matrix, num_latents: Sequence[int] = NUM_LATENTS) -> SparseProbes:
    """Logistic regressions on the latents whose means for yes and no differ most; latents are chosen on training units alone.

    Source: arXiv:2305.01610; as in SAEBench (arXiv:2503.09532), latents are chosen by the difference of their means.

    Raises:
        ValueError: fewer latents than num_latents asks for.
    """
    if z_UK.shape[1] < max(num_latents):
        raise ValueError(f"k of the autoencoder ({z_UK.shape[1]}) must be >= latents of a probe ({max(num_latents)})")
    chosen, right = [], []
    for answer_U in probes.answers.values():
        latent_S = np.argsort(-np.abs(_mean_difference(z_UK, answer_U, probes.is_test_U)), kind="stable")[: max(num_latents)]
        chosen.append(latent_S)
        z_US = z_UK[:, latent_S].toarray()
        _, scale_S = _standard(z_US[~probes.is_test_U])
        answers = []
        for number in num_latents:
            part_US = z_US[:, :number] / scale_S[:number]
            weight_S, bias = _fitted(part_US, answer_U, probes.is_test_U)
            answers.append(_says_yes(part_US, weight_S, bias))
        right.append(answers)
    return SparseProbes(np.array(chosen), _hits(probes, right))


def perturbation(probes: ProbeSet, z_UK: csr_matrix, sae: SAE, dense: DenseProbes) -> Perturbation:
    """Set the NUM_REMOVED latents that speak most for a question to 0, x - z_L W_dec[L], and see which probes fail.

    The latents L of a question are those with the largest (mean z for yes - mean z for no) * (W_dec row . weight of the probe),
    on training units.

    Source: targeted probe perturbation of SAEBench, arXiv:2503.09532.
    """
    row_KD = sae.folded_weights()["W_dec"].double().numpy()
    before_Q = dense.hits.accuracy()[:, 0]
    fall_QQ = np.zeros((len(before_Q), len(before_Q)))
    for place, (answer_U, weight_D) in enumerate(zip(probes.answers.values(), dense.weight_QD, strict=True)):
        effect_K = _mean_difference(z_UK, answer_U, probes.is_test_U) * (row_KD @ weight_D)
        removed = np.argsort(-effect_K, kind="stable")[:NUM_REMOVED]
        x_UD = probes.x_UD - z_UK[:, removed] @ row_KD[removed]
        right = [[_says_yes(x_UD, *probe)] for probe in zip(dense.weight_QD, dense.bias_Q, strict=True)]
        fall_QQ[place] = before_Q - _hits(probes, right).accuracy()[:, 0]
    own_Q = np.diag(fall_QQ)
    num_others = len(own_Q) * (len(own_Q) - 1)
    others = (fall_QQ.sum() - own_Q.sum()) / num_others if num_others else float("nan")
    return Perturbation(float(own_Q.mean()), float(others))


def _mean_difference(z_UK: csr_matrix, answer_U: Answers, is_test_U: NDArray[np.bool_]) -> Floats:
    """Mean latents of the training units with yes, less that of those with no: float64 [K]."""
    of_yes_U, of_no_U = (((answer_U == answer) & ~is_test_U).astype(np.float64) for answer in (1, 0))
    weight_U = of_yes_U / of_yes_U.sum() - of_no_U / of_no_U.sum()
    return np.asarray(z_UK.T @ weight_U).ravel()


def _standard(x_UD: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means, and standard deviations, 1 where a value never changes."""
    scale_D = x_UD.std(axis=0)
    return x_UD.mean(axis=0), np.where(scale_D > 0, scale_D, np.float32(1))


def _fitted(x_UD: NDArray[np.float32], answer_U: Answers, is_test_U: NDArray[np.bool_]) -> tuple[Floats, float]:
    """Weights and bias of a logistic regression of the training units, in which yes and no weigh the same."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    is_used_U = (answer_U >= 0) & ~is_test_U
    model: Any = LogisticRegression(class_weight="balanced", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # all are stopped alike, and measured on held-out documents
        model.fit(x_UD[is_used_U], answer_U[is_used_U])
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


def _says_yes(x_UD: NDArray[Any], weight_D: Floats, bias: float) -> NDArray[np.bool_]:
    return np.asarray(x_UD @ weight_D + bias > 0)


def _hits(probes: ProbeSet, says_yes: Sequence[Sequence[NDArray[np.bool_]]]) -> Hits:
    """says_yes: for each question and each number of latents, bool [U]."""
    document_T = probes.document_U[probes.is_test_U]
    documents, place_T = np.unique(document_T, return_inverse=True)
    num_sizes = len(says_yes[0]) if says_yes else 0
    hit_PQS2 = np.zeros((len(documents), len(says_yes), num_sizes, 2))
    case_PQ2 = np.zeros((len(documents), len(says_yes), 2))
    for question, answer_U in enumerate(probes.answers.values()):
        answer_T = answer_U[probes.is_test_U]
        for answer in (0, 1):
            is_case_T = answer_T == answer
            case_PQ2[:, question, answer] = np.bincount(place_T, is_case_T, len(documents))
            for size, says_yes_U in enumerate(says_yes[question]):
                is_hit_T = is_case_T & (says_yes_U[probes.is_test_U] == answer)
                hit_PQS2[:, question, size, answer] = np.bincount(place_T, is_hit_T, len(documents))
    return Hits(hit_PQS2, case_PQ2)
