"""What is left of a Mourre estimate on finitely many sites.

[H0, iA] = 1 is impossible there: a commutator has trace 0, the identity has trace N. Two identities are exact up to a defect of
fixed rank at the edge.
"""

from typing import NamedTuple

import torch

MAX_SITES = 256  # the identities do not depend on the size, and larger ones only cost time


class MourreCheck(NamedTuple):
    """How far the commutators are from the identities, and the rank of what the edge takes from them.

    momentum_error: max |[P, iX] - (1 - w w^T)|, w_j = (-1)^j, P_jk = -i (-1)^(j - k) / (j - k) (sinc-DVR), X_j = j.
    momentum_defect_rank: of 1 - [P, iX]; 1.
    lattice_error: max |[H0, iA] - (4 - H0^2)| over the inner rows, A = (vX + Xv) / 2, v = i[H0, X], H0 hopping 1.
    lattice_defect_rank: of the difference on all rows; 2, from 4 sites on.
    """

    momentum_error: float
    momentum_defect_rank: int
    lattice_error: float
    lattice_defect_rank: int


def check_mourre(num_sites: int) -> MourreCheck:
    """Both identities on min(num_sites, 256) sites, at least 4, in complex128."""
    num_sites = max(min(num_sites, MAX_SITES), 4)
    place = torch.arange(num_sites, dtype=torch.float64)
    distance = place[:, None] - place
    sign = 1.0 - 2.0 * (distance % 2)
    identity, X = torch.eye(num_sites).to(torch.complex128), torch.diag(place).to(torch.complex128)
    P = -1j * torch.where(distance == 0, 0.0, sign / distance)
    H0 = (distance.abs() == 1).to(torch.complex128)
    momentum = _commutator(P, 1j * X)
    v = 1j * _commutator(H0, X)
    lattice_defect = _commutator(H0, 0.5j * (v @ X + X @ v)) - (4.0 * identity - H0 @ H0)
    return MourreCheck(
        float((momentum - (identity - sign)).abs().max()),
        int(torch.linalg.matrix_rank(identity - momentum)),
        float(lattice_defect[1:-1].abs().max()),
        int(torch.linalg.matrix_rank(lattice_defect)),
    )


def _commutator(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b - b @ a
