"""A language model whose feed-forward layers are one tile each, or dense, made into one of routed tiles.

Legend: B texts, T tokens, D model width, F neurons of a layer, E tiles, H = F / E neurons of a tile.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from trix.nn.block import TriXBlock
from trix.nn.feed_forward import FFNConfig
from trix.nn.ffn import TriXFFN
from trix.nn.language_model import LanguageModel
from trix.nn.tiles import TernaryTiles
from trix.routing.balance import ALL_STEPS
from trix.routing.router import SignatureRouter
from trix.routing.surgery import ALL_TILES
from trix.upcycling.groups import coactive_groups, random_groups
from trix.upcycling.one_tile import OneTile, one_tile, tile_weights
from trix.upcycling.signatures import Signatures, best_tiles, fit_signatures

Grouping = Literal["coactive", "random"]
GROUPINGS: tuple[Grouping, ...] = ("coactive", "random")


class Upcycled(NamedTuple):
    """network: the model of tiles, in evaluation mode. groups: the neurons of each tile, int64 [E, H] for each layer."""

    network: LanguageModel
    groups: list[Tensor]


@torch.no_grad()
def upcycle(
    network: LanguageModel,
    token_BT: Tensor,
    num_tiles: int,
    top_k: int,
    *,
    grouping: Grouping = "coactive",
    seed: int = 0,
    freeze: bool = False,
) -> Upcycled:
    """Cut every feed-forward layer into tiles and give these signatures; all else is as it was.

    y[t] = sum_k tile_e(x[t]) with e = tile_idx[t, k], each tile with weight 1: with top_k = num_tiles the function is that of
    the layer. The tiles hold the very codes and scales of the layer (:func:`~trix.upcycling.one_tile.tile_weights`); a dense
    layer is made ternary by them. The signatures read the layer's own input (``route_on: hidden``) and are fitted layer by
    layer to the tiles that the layer's output needs most, on the input that the layers before it, already cut, give.
    They come with a bias of each tile, which stands in the balance bias and is at rest. The surgery history of each layer says
    what was done.

    Args:
        token_BT: int64, the text on which neurons are grouped and signatures fitted.
        grouping: ``coactive`` (:func:`~trix.upcycling.groups.coactive_groups`), or ``random``, the control.
        seed: seed of the groups and of the batches that signatures are fitted on. freeze: no training moves the signatures.

    Raises:
        ValueError: another grouping, top_k > num_tiles, num_tiles does not divide F, and as
            :func:`~trix.upcycling.one_tile.one_tile`.
    """
    layers = check_upcycling(network, num_tiles, top_k)
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping ({grouping!r}) must be {' or '.join(map(repr, GROUPINGS))}")
    groups = [
        random_groups(len(layer.up_FD), num_tiles, seed + index)
        if grouping == "random"
        else coactive_groups(layer.hidden(x_TD), num_tiles, seed)
        for index, (layer, x_TD) in enumerate(zip(layers, inputs_of(network, token_BT), strict=True))
    ]
    made = cut(network, groups, top_k)
    for index, (layer, groups_EH) in enumerate(zip(layers, groups, strict=True)):
        x_TD = inputs_of(made, token_BT)[index]
        is_best_TE = best_tiles_of(layer, groups_EH, x_TD, top_k)
        ffn = tiles_of(made)[index]
        place_signatures(ffn, fit_signatures(x_TD, is_best_TE, seed), freeze)
        ffn.surgery_log.record(
            "upcycle", ALL_TILES, grouping=grouping, top_k=top_k, num_tokens=token_BT.numel(), seed=seed, frozen=freeze
        )
    return Upcycled(made, groups)


def check_upcycling(network: LanguageModel, num_tiles: int, top_k: int) -> list[OneTile]:
    """The layers that will be cut.

    Raises:
        ValueError: top_k > num_tiles, num_tiles does not divide F, and as :func:`~trix.upcycling.one_tile.one_tile`.
    """
    if not 1 <= top_k <= num_tiles:
        raise ValueError(f"top_k ({top_k}) must be >= 1 and <= num_tiles ({num_tiles})")
    layers = [one_tile(block.ffn) for block in _blocks(network)]
    num_neurons = len(layers[0].up_FD)
    if num_neurons % num_tiles:
        raise ValueError(f"num_tiles ({num_tiles}) must divide the neurons of a layer ({num_neurons})")
    return layers


def cut(network: LanguageModel, groups: Sequence[Tensor], top_k: int) -> LanguageModel:
    """The model with the neurons of each layer in tiles, int64 [E, H] a layer; a neuron that no group has is left out.

    The routers' signatures are as drawn: :func:`upcycle` gives them those that fit.
    """
    num_tiles, size = groups[0].shape
    config = replace(network.config, ffn=upcycled_ffn(num_tiles, num_tiles * size, top_k))
    made = LanguageModel(network.vocab_size, config).to(network.embedding.weight.dtype).eval()
    own = made.state_dict()
    layers = [f"stack.blocks.{index}.feed_forward.inner." for index in range(len(groups))]
    made.load_state_dict(
        own
        | {name: value for name, value in network.state_dict().items() if name in own and not name.startswith(tuple(layers))}
    )
    for old, new, groups_EH in zip(_blocks(network), tiles_of(made), groups, strict=True):
        up_EHD, down_EDH = tile_weights(one_tile(old.ffn), groups_EH)
        tiles = cast(TernaryTiles, new.tiles)
        tiles.up.weight, tiles.down.weight = nn.Parameter(up_EHD), nn.Parameter(down_EDH)
        if isinstance(old.ffn, TriXFFN):
            new.surgery_log.load_state_dict(old.ffn.surgery_log.state_dict())
    return made


def upcycled_ffn(num_tiles: int, d_ff: int, top_k: int) -> FFNConfig:
    """The configuration of the layers of :func:`cut`. No balance loss: the load is what the fitted signatures make it."""
    return FFNConfig(
        num_tiles=num_tiles, d_ff=d_ff, top_k=top_k, route_on="hidden", balance_weight=0.0, routing_args={"gate": "ones"}
    )


@torch.no_grad()
def place_signatures(ffn: TriXFFN, signatures: Signatures, freeze: bool) -> None:
    """Give all tiles of a layer signatures and balance biases, which are at rest from now on."""
    router = cast(SignatureRouter, ffn.router)
    for tile_idx, signature_D in enumerate(signatures.signature_ED):
        router.insert(tile_idx, signature_D, freeze=False)
    router.balance_bias.copy_(signatures.bias_E)
    router.balance_age_E.fill_(ALL_STEPS)
    router.note_surgery()
    if freeze:
        router.freeze_all()


@torch.no_grad()
def inputs_of(network: LanguageModel, token_BT: Tensor) -> list[Tensor]:
    """What each feed-forward layer reads, after its norm: [B * T, D] for each layer. A text is run as a whole."""
    noted: list[list[Tensor]] = [[] for _ in network.stack.blocks]
    handles = [
        cast(nn.Module, block.ffn).register_forward_pre_hook(lambda _, inputs, notes=notes: notes.append(inputs[0]))
        for block, notes in zip(_blocks(network), noted, strict=True)
    ]
    try:
        for part_BT in torch.split(token_BT, 64):
            network(part_BT)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(notes).flatten(0, 1) for notes in noted]


def best_tiles_of(layer: OneTile, groups_EH: Tensor, x_TD: Tensor, top_k: int) -> Tensor:
    """:func:`~trix.upcycling.signatures.best_tiles` of the tiles that the groups are: bool [T, E]."""
    parts = [best_tiles(layer.tile_outputs(layer.hidden(part_TD), groups_EH), top_k) for part_TD in torch.split(x_TD, 2048)]
    return torch.cat(parts)


def tiles_of(network: LanguageModel) -> list[TriXFFN]:
    """The feed-forward layers of a model that was cut."""
    return [cast(TriXFFN, block.ffn) for block in _blocks(network)]


def _blocks(network: LanguageModel) -> list[TriXBlock]:
    return [cast(TriXBlock, block) for block in network.stack.blocks]
