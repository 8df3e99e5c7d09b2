"""Whether a latent decides the tile: its contribution is removed, and the tokens whose tile changes are counted.

Legend: R tokens looked at, D width, K latents, E tiles, P documents, B documents of a batch, T tokens of a document.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trix.nn import TriXBlock
from trix.nn.routed_layer import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import LayerOutput, RowContext, TokenContext
from trix.superposition.tiles.traffic import DecodingCoder, IntArray, Traffic, decoder_rows

Decides = Literal["token", "context", "hidden"]
Choose = Callable[[IntArray, Tensor], IntArray]  # tokens [R], what is subtracted from each [R, D] -> their tiles [R]

MAX_TOKENS_OF_TILE = 256
NUM_DRAWS = 8


class CausalCheck(NamedTuple):
    """Tokens whose tile changes when one latent's contribution is removed.

    latent_E: the latent of each tile, -1 for a tile without one. tokens_E: tokens of the tile that were looked at: the latent
    is active on them, and so is another one. changed_E: those of them that go to another tile without the latent.
    random_changed_E: without a contribution of the same norm along a random other active latent, the mean of several draws.
    """

    latent_E: IntArray
    tokens_E: IntArray
    changed_E: IntArray
    random_changed_E: npt.NDArray[np.float64]

    @property
    def changed(self) -> float:
        """Share of the tokens of all tiles; NaN without any."""
        return _share(float(self.changed_E.sum()), int(self.tokens_E.sum()))

    @property
    def random_changed(self) -> float:
        """The same with random latents."""
        return _share(float(self.random_changed_E.sum()), int(self.tokens_E.sum()))

    @property
    def ratio(self) -> float:
        """How many times as many tiles change as with random latents; inf where these change none, NaN where neither does."""
        if self.random_changed_E.sum() == 0:
            return float("inf") if self.changed_E.sum() > 0 else float("nan")
        return float(self.changed_E.sum() / self.random_changed_E.sum())


def decided_by(block: TriXBlock) -> Decides:
    """What a block's router reads: the ``token`` alone, by its embedding or its id; the ``context``, by a code of the last few
    tokens that nothing trains; or ``hidden`` states. In the first two cases no change of hidden states changes a tile.

    Raises:
        ValueError: a block without tiles.
    """
    if not isinstance(block.ffn, RoutedLayer):
        raise ValueError(f"feed-forward layer ({type(block.ffn).__name__}) must have tiles")
    if block.reads_code:
        return "context"
    if not block.ffn.router.reads_stream:
        return "token"
    return "token" if block.routing_norm is not None and block.ffn.router.reads_features else "hidden"


def at_router(traffic: Traffic, layer: RoutedLayer) -> Choose:
    """The tiles of activations at router_in, for :func:`causal_check`.

    Raises:
        ValueError: when it is called, a router that reads phases or token ids, or activations of another width.
    """

    @torch.no_grad()
    def choose(rows: IntArray, removed_RD: Tensor) -> IntArray:
        return best_tiles(layer, traffic.x_ND[torch.from_numpy(rows)] - removed_RD)

    return choose


def best_tiles(layer: RoutedLayer, x_ND: Tensor) -> IntArray:
    """The best tile of each row, int64 [N], as the layer's router chooses it."""
    emergent_ED = layer.emergent_signatures()
    if isinstance(layer, SparseLookupFFN):
        tile_NK = layer.router.select(x_ND, emergent_ED)[0]
    else:
        tile_NK = layer.router(x_ND, RowContext(), emergent_ED).tile_idx
    tiles: IntArray = tile_NK[:, 0].cpu().numpy()
    return tiles


def at_block(traffic: Traffic, block: TriXBlock) -> Choose:
    """The tiles of activations at resid_pre, for :func:`causal_check`: the block runs on the documents of the tokens, and what
    is removed is removed at all of these at once.

    Raises:
        ValueError: documents of which a token was left out, a block that is not decided by hidden states.
    """
    if not traffic.has_whole_documents():
        raise ValueError("documents must be whole for their block to run: tokens were left out of the dump")
    if decided_by(block) != "hidden":
        raise ValueError(f"routing of the block (decided by the {decided_by(block)}) must be decided by hidden states")
    starts_P, token_N = traffic.starts_P, torch.from_numpy(traffic.token_N)

    @torch.no_grad()
    def choose(rows: IntArray, removed_RD: Tensor) -> IntArray:
        document_R = np.searchsorted(starts_P, rows, side="right") - 1
        documents, place_R = np.unique(document_R, return_inverse=True)
        x_BTD, mask_BT = traffic.padded(documents.tolist(), traffic.x_ND)
        token_BT, _ = traffic.padded(documents.tolist(), token_N)
        at = (torch.from_numpy(place_R), torch.from_numpy(rows - starts_P[document_R]))
        x_BTD[at] -= removed_RD
        mask = None if bool(mask_BT.all()) else mask_BT
        output: LayerOutput = block(x_BTD, return_routing=True, context=TokenContext(token_BT, mask))
        assert output.routing is not None
        tiles: IntArray = output.routing["tile_idx"][..., 0][at].numpy()
        return tiles

    return choose


def causal_check(
    traffic: Traffic,
    sae: DecodingCoder,
    latent_E: Sequence[int],
    choose: Choose,
    num_draws: int = NUM_DRAWS,
    max_tokens: int = MAX_TOKENS_OF_TILE,
    seed: int = 0,
) -> CausalCheck:
    """Remove z_j W_dec[j] where tile e was chosen and its latent j is active, and count the tokens that change their tile.

    The control removes |z_j W_dec[j]| W_dec[l] / |W_dec[l]| instead, l another latent that is active on the token, drawn anew
    num_draws times.

    Args:
        latent_E: a latent for each tile, -1 for none, found on other documents than these. choose: :func:`at_router` or
            :func:`at_block`, made from the same traffic. max_tokens: the most tokens of a tile, drawn with the seed, as are the
            latents.

    Raises:
        ValueError: another number of latents than of tiles, a latent outside [-1, K), num_draws or max_tokens < 1.
    """
    if min(num_draws, max_tokens) < 1:
        raise ValueError(f"num_draws ({num_draws}) and max_tokens ({max_tokens}) must be >= 1")
    if len(latent_E) != traffic.num_tiles or not -1 <= min(latent_E) <= max(latent_E) < traffic.num_latents:
        raise ValueError(
            f"latents ({len(latent_E)}) must be as many as tiles ({traffic.num_tiles}), >= -1 and < {traffic.num_latents}"
        )
    draw, row_KD = np.random.default_rng(seed), decoder_rows(sae).cpu()
    norm_K = row_KD.norm(dim=-1)
    num_active_N = traffic.latent_NK.getnnz(axis=1)
    by_latent = traffic.latent_NK.tocsc()
    counts = np.zeros((3, traffic.num_tiles))
    for tile, latent in enumerate(latent_E):
        if latent < 0:
            continue
        rows = np.sort(by_latent.indices[by_latent.indptr[latent] : by_latent.indptr[latent + 1]]).astype(np.int64)
        rows = rows[(num_active_N[rows] > 1) & (traffic.tile_N[rows] == tile)]
        rows = np.sort(draw.permutation(rows)[:max_tokens])
        if len(rows) == 0:
            continue
        # Not the tiles of the dump, whose activations are rounded.
        base_R = choose(rows, torch.zeros(len(rows), row_KD.shape[1]))
        z_R1 = torch.from_numpy(traffic.latent_NK[rows, latent].toarray().ravel()).unsqueeze(-1)
        counts[0, tile], counts[1, tile] = len(rows), (choose(rows, z_R1 * row_KD[latent]) != base_R).sum()
        for _ in range(num_draws):
            other_R = torch.from_numpy(_other_latents(traffic, rows, latent, draw))
            removed_RD = z_R1 * norm_K[latent] * row_KD[other_R] / norm_K[other_R].unsqueeze(-1)
            counts[2, tile] += (choose(rows, removed_RD) != base_R).sum() / num_draws
    tokens_E, changed_E = counts[:2].astype(np.int64)
    return CausalCheck(np.asarray(latent_E, dtype=np.int64), tokens_E, changed_E, counts[2])


def _other_latents(traffic: Traffic, rows: IntArray, latent: int, draw: np.random.Generator) -> IntArray:
    """For each token a latent that is active on it, other than the given one."""
    pointer, indices = traffic.latent_NK.indptr, traffic.latent_NK.indices
    drawn = np.empty(len(rows), dtype=np.int64)
    for place, row in enumerate(rows):
        active = indices[pointer[row] : pointer[row + 1]]
        drawn[place] = draw.choice(active[active != latent])
    return drawn


def _share(part: float, whole: int) -> float:
    return part / whole if whole else float("nan")
