"""Four ways to learn or choose signatures on context, tried against those that stay as drawn."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from cases.char_lm_quality import train_model
from sklearn.cluster import KMeans
from torch import Tensor

from trix.evolution import copy_tile_state, tile_parameters
from trix.functional.ternary import absmean_codes, straight_through, threshold_ternary
from trix.introspection import NgramReader, count_ngrams, design_signature, forecast
from trix.introspection.ngrams import NO_TOKEN, Ngrams, joined, ngrams_at
from trix.nn import LanguageModel, LanguageModelConfig, TriXFFN, routed_layers
from trix.routing.router import SIGNATURE_THRESHOLD, SignatureRouter

SMOOTHING = 10.0  # characters, distributed as in the whole text, that count as if they had followed each pair
NUM_FIRST = 32  # tiles in use at the start of growth
NUM_LOOKS, NUM_BATCHES = 8, 8  # times that tiles are split; batches whose losses decide which
NUM_DESIGNED_FOR = 256  # n-grams with the highest loss, which a design takes into account
MAX_SHARE = 0.8  # of a tile's loss, that either tile should have after a split


class HysteresisRouter(SignatureRouter):
    """Explicit signatures in which a value changes only after the learned one has asked for it ``patience`` batches in a row.

    The learned value gets the gradient of the one in force. Made for training from drawn signatures: a signature that is
    inserted must be frozen.
    """

    in_force_ED: Tensor
    asked_ED: Tensor
    num_asked_ED: Tensor

    def __init__(self, d_model: int, num_tiles: int, *args: Any, patience: int, **settings: Any) -> None:
        super().__init__(d_model, num_tiles, *args, **settings)
        self.patience = patience
        self.register_buffer("in_force_ED", self._asked())
        self.register_buffer("asked_ED", self._asked())
        self.register_buffer("num_asked_ED", torch.zeros(num_tiles, d_model, dtype=torch.int32))

    def signatures(self, emergent_ED: Tensor | None = None) -> Tensor:
        learned_ED = super().signatures(emergent_ED)
        held_ED = torch.where(self.is_frozen_E.unsqueeze(-1), learned_ED, self.in_force_ED)
        return straight_through(held_ED, learned_ED)

    def _asked(self) -> Tensor:
        return threshold_ternary(self.raw().detach(), SIGNATURE_THRESHOLD).to(torch.int8)

    @torch.no_grad()
    def _after(self, num_batches: int, nudge_E: Tensor | None) -> dict[str, Tensor]:
        asked_ED = self._asked()
        num_ED = torch.where(asked_ED == self.asked_ED, self.num_asked_ED, 0) + num_batches
        num_ED = torch.where(asked_ED == self.in_force_ED, 0, num_ED)
        in_force_ED = torch.where(num_ED >= self.patience, asked_ED, self.in_force_ED)
        found = {"in_force_ED": in_force_ED, "asked_ED": asked_ED, "num_asked_ED": num_ED}
        return super()._after(num_batches, nudge_E) | found


def set_signatures(model: LanguageModel, signatures_LED: Iterable[Tensor], tag: str) -> None:
    """Give each layer these signatures and freeze them; the balance bias starts anew, as it does for drawn ones."""
    for layer, signature_ED in zip(routed_layers(model), signatures_LED, strict=True):
        for tile_idx, signature_D in enumerate(signature_ED):
            layer.insert_signature(tile_idx, signature_D, freeze=False, tag=tag)
        layer.freeze_all_signatures(tag)


def learned_signatures(
    config: LanguageModelConfig, vocab_size: int, batches: list[Any], seed: int, lr: float, title: str
) -> list[Tensor]:
    """The signatures of each layer after a run over these batches: the first stage of StableMoE (arXiv:2204.08396)."""
    torch.manual_seed(seed)
    model = LanguageModel(vocab_size, config)
    train_model(model, batches, len(batches), lr, title)
    return [layer.get_tile_signatures() for layer in routed_layers(model)]


def cluster_signatures(model: LanguageModel, token_BT: Tensor, seed: int) -> list[Tensor]:
    """One signature for each cluster of the text's pairs: the ternary form of the mean code of these pairs, weighted by counts.

    Each layer has a clustering of its own. Where a text has too few pairs, the tiles that are left keep their signatures.
    """
    trigrams, reader = count_ngrams(token_BT, 3), NgramReader(model)
    signatures_LED = []
    for index, layer in enumerate(reader.layers):
        pairs, group_N = pair_clusters(trigrams, model.vocab_size, layer.num_tiles, seed + index)
        count_N1 = pairs.count_N.float().unsqueeze(-1)
        sum_ED = torch.zeros(layer.num_tiles, layer.d_model).index_add_(0, group_N, count_N1 * reader.codes(pairs.id_NJ))
        is_empty_E1 = torch.bincount(group_N, minlength=layer.num_tiles).unsqueeze(-1) == 0
        signatures_LED.append(torch.where(is_empty_E1, layer.get_tile_signatures(), absmean_codes(sum_ED)[0]))
    return signatures_LED


def pair_clusters(trigrams: Ngrams, vocab_size: int, num_clusters: int, seed: int) -> tuple[Ngrams, Tensor]:
    """The pairs of characters that another one follows, and the cluster of each, int64 [N], by what follows it.

    k-means on the square roots of the smoothed distributions, weighted by counts, makes half of the clusters. To level the
    loads, the heaviest cluster is then cut in two until there are enough.
    """
    is_whole_M = trigrams.id_NJ[:, 1] != NO_TOKEN
    id_MJ, count_M = trigrams.id_NJ[is_whole_M], trigrams.count_N[is_whole_M]
    id_NJ, place_M = torch.unique(id_MJ[:, :2], dim=0, return_inverse=True)
    count_NV = torch.zeros(len(id_NJ), vocab_size, dtype=torch.float64)
    count_NV.index_put_((place_M, id_MJ[:, 2]), count_M.double(), accumulate=True)
    count_N, share_V = count_NV.sum(dim=1), count_NV.sum(dim=0) / count_NV.sum()
    root_NV = ((count_NV + SMOOTHING * share_V) / (count_N + SMOOTHING).unsqueeze(-1)).sqrt()

    def parted(row_M: Tensor, num_parts: int) -> Tensor:
        means = KMeans(min(num_parts, len(row_M)), n_init=4, random_state=seed)
        return torch.from_numpy(means.fit_predict(root_NV[row_M].numpy(), sample_weight=count_N[row_M].numpy())).long()

    group_N = parted(torch.arange(len(id_NJ)), max(num_clusters // 2, 1))
    for new in range(int(group_N.max()) + 1, num_clusters):
        load_G = torch.bincount(group_N, weights=count_N).masked_fill(torch.bincount(group_N) < 2, 0.0)
        row_M = (group_N == load_G.argmax()).nonzero().flatten()
        group_N[row_M[parted(row_M, 2) == 1]] = new
    return Ngrams(id_NJ, count_N.long()), group_N


class Growth:
    """Starts with NUM_FIRST of the drawn tiles in use, and splits tiles in the first half of training until all are in use.

    The tile with the highest summed loss is split: the n-grams that make up half of that loss, the costliest first, get a new
    tile with the same weights and a signature designed for them. Where that would leave nearly all of the loss with one of the
    two tiles, the signature is designed for half as many n-grams, and so on. Otherwise all signatures are frozen.
    """

    def __init__(self, model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.model, self.optimizer, self.reader = model, optimizer, NgramReader(model)
        self.steps_between = max(steps // 2 // NUM_LOOKS, 1)
        self.batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=NUM_BATCHES)
        for layer in self.reader.layers:
            for tile_idx in range(NUM_FIRST, layer.num_tiles):
                layer.remove_tile(tile_idx, tag="growth")
            layer.freeze_all_signatures(tag="growth")

    def after_step(self, step: int, token_BT: Tensor, target_BT: Tensor) -> None:
        self.batches.append((token_BT, target_BT))
        look, rest = divmod(step, self.steps_between)
        if rest == 0 and look <= NUM_LOOKS:
            losses = self._losses()
            for index, layer in enumerate(self.reader.layers):
                for tile_idx in range(NUM_FIRST, NUM_FIRST + (layer.num_tiles - NUM_FIRST) * look // NUM_LOOKS):
                    if layer.free_slots()[tile_idx]:
                        self._split(index, tile_idx, losses)

    @torch.no_grad()
    def _losses(self) -> Ngrams:
        """The n-grams of the last batches; the count of each is its summed loss, in thousandths of a nat."""
        self.model.eval()
        parts = []
        for token_BT, target_BT in self.batches:
            loss_BT = F.cross_entropy(self.model(token_BT).mT, target_BT, reduction="none")
            parts.append(Ngrams(ngrams_at(token_BT, self.reader.num_tokens), (1000 * loss_BT).long().flatten()))
        self.model.train()
        return joined(parts)

    @torch.no_grad()
    def _split(self, index: int, target_idx: int, losses: Ngrams) -> None:
        layer, claims = self.reader.layers[index], self.reader.claims(losses, index)
        assert isinstance(layer, TriXFFN)
        rate_E = claims.rates()
        several = [tile_idx for tile_idx in range(layer.num_tiles) if int(claims.is_claimed(tile_idx).sum()) > 1]
        if not several:
            return
        source_idx = max(several, key=lambda tile_idx: float(rate_E[tile_idx]))
        found = claims.of_tile(source_idx)
        before_N = torch.tensor([share for _, share in found]).cumsum(dim=0) - found[0][1]
        wanted_MJ = torch.tensor([ids for ids, _ in found])[before_N < rate_E[source_idx] / 2]
        costliest = Ngrams(*(value_N[losses.count_N.argsort(descending=True)[:NUM_DESIGNED_FOR]] for value_N in losses))
        while True:
            signature_D = design_signature(self.reader, index, target_idx, wanted_MJ, costliest)
            after_E = forecast(self.reader, index, target_idx, signature_D, wanted_MJ, losses).after.rates()
            if len(wanted_MJ) == 1 or after_E[[source_idx, target_idx]].max() < MAX_SHARE * rate_E[source_idx]:
                break
            wanted_MJ = wanted_MJ[: len(wanted_MJ) // 2]
        for parameter in tile_parameters(layer):
            parameter[target_idx] = parameter[source_idx]
        layer.insert_signature(target_idx, signature_D, tag=f"growth: split of tile {source_idx}")
        copy_tile_state(self.optimizer, layer, source_idx, target_idx)
