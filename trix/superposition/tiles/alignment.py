"""Whether a signature points where a latent does.

Legend: E tiles, D width, K latents, B permutations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trix.superposition.backends.base_model import Site
from trix.superposition.tiles.contingency import FALSE_DISCOVERY_RATE, FloatArray
from trix.superposition.tiles.probe import check_router_in

NUM_PERMUTATIONS = 999


class Alignment(NamedTuple):
    """How well each signature is aligned with a latent.

    latent_E: int64, the latent that it is compared with, -1 for none. cosine_E: of the signature and the latent's decoder row,
    0 without a latent. null_cosine_E: the mean of the same of signatures with permuted signs, compared in the same way. p_E:
    share of the permutations, the signature among them, with a cosine at least as large; 1 without a latent. q_E: adjusted by
    Benjamini and Hochberg.
    """

    latent_E: npt.NDArray[np.int64]
    cosine_E: FloatArray
    null_cosine_E: FloatArray
    p_E: FloatArray
    q_E: FloatArray

    @property
    def num_compared(self) -> int:
        """Signatures with a latent."""
        return int((self.latent_E >= 0).sum())

    @property
    def cosine(self) -> float:
        """Mean of the signatures with a latent; NaN without any."""
        return float(self.cosine_E.sum() / self.num_compared) if self.num_compared else float("nan")

    @property
    def null_cosine(self) -> float:
        """The same of signatures with permuted signs."""
        return float(self.null_cosine_E.sum() / self.num_compared) if self.num_compared else float("nan")

    @property
    def num_aligned(self) -> int:
        """Signatures with q <= .05."""
        return int((self.q_E <= FALSE_DISCOVERY_RATE).sum())


@torch.no_grad()
def signature_alignment(
    signature_ED: Tensor,
    row_KD: Tensor,
    site: Site,
    latent_E: Sequence[int] | None = None,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> Alignment:
    """cos(signature, decoder row), against signatures with the same zeros, whose other signs are in random order.

    The permuted signatures have the same numbers of +1, -1 and 0, so neither the density of a signature nor the number of
    latents to choose from makes an alignment.

    Args:
        signature_ED: in {-1, 0, +1}. row_KD: the decoder of an autoencoder. site: where its activations were taken.
        latent_E: the latent of each tile, -1 for none. None: the latent with the largest cosine, found anew for each permuted
            signature, so that a choice among many is no alignment either.

    Raises:
        ValueError: a site other than router_in, other widths, another number of latents than of tiles, num_permutations < 1.
    """
    check_router_in(site)
    if num_permutations < 1:
        raise ValueError(f"num_permutations ({num_permutations}) must be >= 1")
    if signature_ED.shape[1:] != row_KD.shape[1:]:
        raise ValueError(f"width of the signatures ({signature_ED.shape[-1]}) must be that of the rows ({row_KD.shape[-1]})")
    if latent_E is not None and len(latent_E) != len(signature_ED):
        raise ValueError(f"latents ({len(latent_E)}) must be as many as signatures ({len(signature_ED)})")
    generator = np.random.default_rng(seed)
    unit_KD = F.normalize(row_KD.float().cpu(), dim=-1)
    num_tiles = len(signature_ED)
    best_E, cosine_E, null_E, p_E = np.full(num_tiles, -1), np.zeros(num_tiles), np.zeros(num_tiles), np.ones(num_tiles)
    for tile, signature_D in enumerate(signature_ED.float().cpu()):
        place = signature_D.nonzero().flatten()
        candidates = np.arange(len(unit_KD)) if latent_E is None else np.array([latent_E[tile]])
        if len(place) == 0 or candidates[0] < 0:
            continue
        sign = signature_D[place].numpy()
        drawn_BS = generator.permuted(np.broadcast_to(sign, (num_permutations, len(sign))), axis=1)
        all_BK = torch.from_numpy(np.vstack([sign, drawn_BS])) @ unit_KD[candidates][:, place].T / len(place) ** 0.5
        best_B, place_B = all_BK.max(dim=-1)
        best_E[tile] = candidates[int(place_B[0])]
        cosine_E[tile], null_E[tile] = float(best_B[0]), float(best_B[1:].mean())
        p_E[tile] = float((best_B >= best_B[0] - 1e-6).double().mean())
    from scipy.stats import false_discovery_control  # scipy.stats takes a second to load

    return Alignment(best_E, cosine_E, null_E, p_E, false_discovery_control(p_E))
