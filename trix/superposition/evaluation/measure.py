"""The figures of several autoencoders on the same held-out activations, so that each can be compared with its controls.

Shapes: N tokens, U units of probes, D width, K latents, P documents, Q questions, S numbers of latents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from trix.superposition.evaluation.overlap import seen_share
from trix.superposition.evaluation.probing import (
    MIN_CASES,
    DenseProbes,
    Floats,
    Hits,
    Ints,
    Perturbation,
    ProbeSet,
    dense_probes,
    document_means,
    perturbation,
    sparse_latents,
    sparse_probes,
)
from trix.superposition.evaluation.reconstruction import ReconstructionMetric, max_decoder_cosine
from trix.superposition.evaluation.targets import label_targets, token_targets
from trix.superposition.evaluation.token_rows import TokenRows, read_rows
from trix.superposition.evaluation.verdict import MIN_DOCUMENTS, Errors
from trix.superposition.sae import SAE
from trix.superposition.viz.token_texts import Tokenizer

if TYPE_CHECKING:  # reading dumps needs pydantic, which training does without
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.reader import HeldOut

MAX_ROWS = 40_000  # tokens of the probes, in training and in test


@dataclass(frozen=True)
class Split:
    """What was held out when the autoencoder was trained.

    dump, target: the activations, and those that a transcoder writes. held_out, seed: as in
    :meth:`~trix.superposition.dump.ActivationDump.chunks`.
    """

    dump: "ActivationDump"
    target: "ActivationDump | None"
    held_out: "HeldOut"
    seed: int

    def held_out_rows(self, max_tokens: int | None = None) -> Iterator[TokenRows]:
        return read_rows(self.dump, self.target, "validation", self.held_out, self.seed, max_tokens)

    def training_rows(self, max_tokens: int | None = None) -> Iterator[TokenRows]:
        return read_rows(self.dump, self.target, "training", self.held_out, self.seed, max_tokens)


@dataclass(frozen=True)
class Questions:
    """Questions about tokens, or about documents. pool_UN: None, or the matrix of document_means. dense: probes of x."""

    probes: ProbeSet
    pool_UN: csr_matrix | None
    dense: DenseProbes

    def latents(self, z_NK: csr_matrix) -> csr_matrix:
        return z_NK if self.pool_UN is None else (self.pool_UN @ z_NK).tocsr()


@dataclass(frozen=True)
class EvaluationData:
    """What all autoencoders are measured on.

    mean_O: of the held-out targets, float64. seen_share: see :func:`~trix.superposition.evaluation.overlap.seen_share`.
    documents_P: the numbers of the held-out documents. x_ND: rows that the probes read, those of training first. questions: one
    or two kinds. left_out: questions that have too few cases.
    """

    split: Split
    num_tokens: int
    seen_share: float
    mean_O: Tensor
    documents_P: Ints
    x_ND: Tensor
    questions: list[Questions]
    left_out: list[str]

    @property
    def names(self) -> list[str]:
        """The questions."""
        return [name for part in self.questions for name in part.probes.answers]

    @property
    def dense_hits(self) -> Hits:
        return Hits.joined([part.dense.hits for part in self.questions])


@dataclass(frozen=True)
class Measured:
    """The figures of one autoencoder.

    core: as :class:`~trix.superposition.evaluation.reconstruction.ReconstructionMetric`, and ``decoder_cosine``, the mean over
    latents of the largest cosine with another one. density_K: share of the tokens in which each latent is active. hits: of the
    sparse probes. perturbations: of each kind of question; none of a transcoder, which does not write what it reads.
    """

    core: dict[str, float]
    density_K: Floats
    errors: Errors
    hits: Hits
    latents: dict[str, list[int]]
    perturbations: list[Perturbation]

    @property
    def targeted(self) -> float | None:
        """Mean of what perturbation of a question takes from it, less what it takes from the others."""
        found = [part.targeted for part in self.perturbations if not np.isnan(part.targeted)]
        return float(np.mean(found)) if found else None


def evaluation_data(split: Split, tokenizer: Tokenizer) -> EvaluationData:
    """Read what is held out, ask the questions, and fit the dense probes.

    Raises:
        ValueError: fewer than MIN_DOCUMENTS held-out documents, no question with enough cases, and as the dump says.
    """
    total_O, num_tokens, documents = torch.zeros((), dtype=torch.float64), 0, [np.empty(0, dtype=np.int64)]
    for rows in split.held_out_rows():
        total_O, num_tokens = total_O + rows.target_NO.double().sum(dim=0), num_tokens + len(rows.x_ND)
        documents.append(np.unique(rows.document_N.numpy()))
    documents_P = np.unique(np.concatenate(documents))
    if len(documents_P) < MIN_DOCUMENTS:
        raise ValueError(f"{split.dump.folder}: held-out documents ({len(documents_P)}) must be >= {MIN_DOCUMENTS}")
    test = TokenRows.joined(split.held_out_rows(MAX_ROWS))
    train = TokenRows.joined(split.training_rows(MAX_ROWS))
    rows = TokenRows.joined([train, test])
    is_test_N = np.arange(len(rows.x_ND)) >= len(train.x_ND)
    document_N = rows.document_N.numpy()
    asked = [(ProbeSet(rows.x_ND.numpy(), document_N, is_test_N, token_targets(rows, tokenizer)), None)]
    document_U, pool_UN = document_means(document_N)
    first_U = np.unique(document_N, return_index=True)[1]
    answers = label_targets(rows.label_N.numpy()[first_U])
    asked.append((ProbeSet(pool_UN @ rows.x_ND.numpy(), document_U, is_test_N[first_U], answers), pool_UN))
    usable = [(probes.usable(), pool) for probes, pool in asked]
    left_out = {name for probes, _ in asked for name in probes.answers} - {name for kept, _ in usable for name in kept.answers}
    questions = [Questions(probes, pool, dense_probes(probes)) for probes, pool in usable if probes.answers]
    if not questions:
        raise ValueError(
            f"{split.dump.folder}: questions with at least {MIN_CASES} cases of each answer, both in training and in held-out "
            f"documents (0 of {len(left_out)}), must be >= 1: more tokens are needed"
        )
    return EvaluationData(
        split,
        num_tokens,
        seen_share(split.dump, split.held_out, split.seed),
        total_O / num_tokens,
        documents_P,
        rows.x_ND,
        questions,
        sorted(left_out),
    )


@torch.no_grad()
def measure(data: EvaluationData, saes: Mapping[str, SAE]) -> dict[str, Measured]:
    """The figures of each autoencoder.

    Raises:
        ValueError: an autoencoder of which no latent is active at any held-out token.
    """
    metrics = {name: ReconstructionMetric(sae.d_out, sae.k) for name, sae in saes.items()}
    errors = {name: np.zeros(len(data.documents_P)) for name in saes}
    variance_P = np.zeros(len(data.documents_P))
    for rows in data.split.held_out_rows():
        place_N, target_NO = np.searchsorted(data.documents_P, rows.document_N.numpy()), rows.target_NO.double()
        np.add.at(variance_P, place_N, (target_NO - data.mean_O).square().sum(dim=-1).numpy())
        for name, sae in saes.items():
            x_hat_NO, z_NK = sae(rows.x_ND)
            metrics[name].update(x_hat_NO, rows.target_NO, z_NK)
            np.add.at(errors[name], place_N, (target_NO - x_hat_NO.double()).square().sum(dim=-1).numpy())
    found: dict[str, Measured] = {}
    for name, sae in saes.items():
        core = {key: float(value) for key, value in metrics[name].compute().items()}
        if core["active"] == 0:
            raise ValueError(f"latents of {name} that are active at held-out tokens (0 of {sae.k}) must be >= 1")
        core["decoder_cosine"] = float(max_decoder_cosine(sae).mean())
        z_NK = sparse_latents(sae, data.x_ND)
        latents: dict[str, list[int]] = {}
        hits, perturbations = [], []
        for part in data.questions:
            z_UK = part.latents(z_NK)
            probes = sparse_probes(part.probes, z_UK)
            hits.append(probes.hits)
            latents |= dict(zip(part.probes.answers, probes.latent_QS.tolist(), strict=True))
            if sae.centres_input:
                perturbations.append(perturbation(part.probes, z_UK, sae, part.dense))
        found[name] = Measured(
            core, metrics[name].density_K.numpy(), Errors(errors[name], variance_P), Hits.joined(hits), latents, perturbations
        )
    return found
