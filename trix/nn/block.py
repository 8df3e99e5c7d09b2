"""TriXBlock and TriXStack: blocks of two sublayers, a mixer and a feed-forward layer, on a residual stream."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from trix.nn.feed_forward import FFNConfig
from trix.nn.halting import Halting
from trix.nn.mixer import Mixer
from trix.nn.mixers import MIXERS
from trix.nn.residual import FeedForwardResidual, MixerResidual
from trix.nn.routed_layer import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.outputs import AuxLosses, LayerOutput, RoutingInfo, State, TokenContext

ValueT = TypeVar("ValueT")
KNOWN_OF_ALL_TOKENS = frozenset({"token"})  # what routers may read besides what a mixer gives


class TriXBlock(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)), norm = RMSNorm; a sparse lookup has norm and residual of its own.

    Args:
        d_model: width. n_heads: attention heads. context_length: the longest sequence. dropout: after each sublayer.
        ffn: the feed-forward layer; or its settings one by one, as ``num_tiles=8``.
        ternary_attention: the mixer's projections are ternary.
        mixer: ``attention``, ``resolvent``, ``ssd``, or the import path of a :class:`~trix.nn.mixer.Mixer`. mixer_args: what it
            is made with besides.

    Shape:
        x_BTD: float [B, T, D] -> [B, T, D]. With ``return_routing`` a LayerOutput (x, RoutingInfo, AuxLosses), the latter two
        None where ``ffn.kind`` is a control without tiles. With a state, that of the mixer for the tokens before:
        (LayerOutput, state). context: what else is known of the tokens: ids, for routers that
        read them; a mask: no token looks at padding, it is not counted, and tiles skip it, except in sparse lookups; the
        embeddings, which signatures read, by default x_BTD, as in the first block; the codes, which they read with
        ``route_on: context``; whether it is causal, where is_causal does not say so.

    Raises:
        ValueError: ffn and settings of it at once, a router that reads what the mixer does not give, is_causal False with a
            mixer that is causal only, no codes with ``route_on: context``, and as the mixer and the feed-forward layer.
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        ffn: FFNConfig | None = None,
        context_length: int = 1024,
        ternary_attention: bool = False,
        dropout: float = 0.0,
        *,
        mixer: str = "attention",
        mixer_args: Mapping[str, Any] | None = None,
        **ffn_settings: Any,
    ) -> None:
        super().__init__()
        if ffn is not None and ffn_settings:
            raise ValueError(f"settings of ffn ({', '.join(ffn_settings)}) must stand in ffn, which is given")
        ffn = FFNConfig(**ffn_settings) if ffn is None else ffn
        made = MIXERS.make(
            mixer,
            d_model,
            arguments=mixer_args or {},
            n_heads=n_heads,
            context_length=context_length,
            ternary=ternary_attention,
            dropout=dropout,
        )
        self.mixer = MixerResidual(nn.RMSNorm(d_model), made, dropout)
        layer = ffn.build(d_model, dropout)
        self.feed_forward: FeedForwardResidual | SparseLookupFFN | None
        if layer is None or isinstance(layer, SparseLookupFFN):
            self.feed_forward = layer
        else:
            # As in checkpoints of version 1, whose optimizers can so go on.
            self.feed_forward = FeedForwardResidual(nn.RMSNorm(d_model), layer, dropout, norm_last=True)
        self.routing_norm: nn.RMSNorm | None = None
        self.reads_code = isinstance(layer, RoutedLayer) and ffn.route_on == "context" and layer.router.reads_features
        if isinstance(layer, RoutedLayer):
            _check_reads(layer, made)
            if ffn.route_on == "embedding":
                self.routing_norm = nn.RMSNorm(d_model, elementwise_affine=False)

    @property
    def ffn(self) -> nn.Module | None:
        """The feed-forward layer itself, without norm and residual."""
        return self.feed_forward.inner if isinstance(self.feed_forward, FeedForwardResidual) else self.feed_forward

    @overload
    def forward(
        self, x_BTD: Tensor, is_causal: bool | None = ..., return_routing: Literal[False] = ..., context: TokenContext = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, x_BTD: Tensor, is_causal: bool | None = ..., *, return_routing: Literal[True], context: TokenContext = ...
    ) -> LayerOutput: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool | None = ...,
        return_routing: bool = ...,
        context: TokenContext = ...,
        *,
        state: State,
    ) -> tuple[LayerOutput, State]: ...
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool | None = None,
        return_routing: bool = False,
        context: TokenContext = TokenContext(),
        state: State | None = None,
    ) -> Tensor | LayerOutput | tuple[LayerOutput, State]:
        if is_causal is not None:
            context = context._replace(is_causal=is_causal)
        if self.mixer.inner.is_causal_only and not context.is_causal:
            raise ValueError(f"is_causal ({context.is_causal}) must be True with mixer {type(self.mixer.inner).__name__}")
        embedding_BTD = x_BTD if context.embedding_BTD is None else context.embedding_BTD
        x_BTD, new_state, phase_BT = self.mixer(x_BTD, context, state)
        output = LayerOutput(x_BTD)
        if self.feed_forward is not None:
            routing_BTD = None if self.routing_norm is None else self.routing_norm(embedding_BTD)
            if self.reads_code:
                if context.code_BTD is None:
                    raise ValueError("route_on ('context') needs a code of each token, context.code_BTD, got None")
                routing_BTD = context.code_BTD
            mask_BT = _both(context.mask_BT, context.is_running_BT)
            known = context._replace(embedding_BTD=routing_BTD, phase_BT=phase_BT, mask_BT=mask_BT)
            output = self.feed_forward.layer_output(x_BTD, known)
        if state is not None:
            return output, new_state
        return output if return_routing else output.x_BTD


def _both(mask_BT: Tensor | None, is_running_BT: Tensor | None) -> Tensor | None:
    if mask_BT is None or is_running_BT is None:
        return is_running_BT if mask_BT is None else mask_BT
    return mask_BT & is_running_BT


def _check_reads(layer: RoutedLayer, mixer: Mixer) -> None:
    missing = sorted(layer.router.reads - KNOWN_OF_ALL_TOKENS - mixer.gives)
    if missing:
        kind, giver = type(layer.router).__name__, type(mixer).__name__
        raise ValueError(f"what router {kind} reads ({', '.join(missing)}) must be given by the mixer, which {giver} does not")


class TriXStack(nn.Module):
    """num_layers TriXBlocks, one after the other.

    Args:
        num_layers: 4 by default; n_layers is another name for it.
        attention_at: the places of blocks, counted from 0, that mix by attention whatever ``mixer`` says.
        halt_threshold: adaptive computation time: each token ends its computation after a block of its own choice, see
            :class:`~trix.nn.halting.Halting`. None: after the last.
        block: all others of :class:`TriXBlock`.

    Shape:
        x_BTD: float -> [B, T, D]. With ``return_routing`` also the RoutingInfo of each routed layer, in order, and the summed
        AuxLosses (None without routed layers). With a state, one for each block, of the tokens before: (the same three, the
        new states). context: as TriXBlock, of the embeddings x_BTD. streams: a list that the input of each block is added to,
        [B, T, D].

    Raises:
        ValueError: num_layers < 1, attention_at names no block, another number of states than of blocks, and as TriXBlock.
    """

    def __init__(
        self,
        num_layers: int | None = None,
        d_model: int = 512,
        n_heads: int = 8,
        ffn: FFNConfig | None = None,
        *,
        n_layers: int | None = None,
        attention_at: Sequence[int] = (),
        mixer: str = "attention",
        mixer_args: Mapping[str, Any] | None = None,
        halt_threshold: float | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        if num_layers is not None and n_layers is not None:
            raise ValueError(f"num_layers ({num_layers}) and n_layers ({n_layers}) are two names of one number: give one")
        num_layers = next((number for number in (num_layers, n_layers) if number is not None), 4)
        if num_layers < 1:
            raise ValueError(f"num_layers ({num_layers}) must be >= 1")
        if not set(attention_at) <= set(range(num_layers)):
            raise ValueError(f"attention_at ({list(attention_at)}) must be >= 0 and < num_layers ({num_layers})")
        of_mixer: dict[str, Any] = {"mixer": mixer, "mixer_args": mixer_args}
        self.blocks = nn.ModuleList(
            TriXBlock(d_model, n_heads, ffn, **({} if index in attention_at else of_mixer), **block)
            for index in range(num_layers)
        )
        self.halting = None if halt_threshold is None else Halting(d_model, halt_threshold)

    @property
    def reads_code(self) -> bool:
        """Whether any block routes on codes of contexts."""
        return any(cast(TriXBlock, block).reads_code for block in self.blocks)

    @property
    def mixers(self) -> list[Mixer]:
        return [cast(TriXBlock, block).mixer.inner for block in self.blocks]

    def empty_state(self, batch_size: int) -> tuple[State, ...]:
        """The state of each block before the first token."""
        return tuple(mixer.empty_state(batch_size) for mixer in self.mixers)

    @overload
    def forward(
        self, x_BTD: Tensor, is_causal: bool | None = ..., return_routing: Literal[False] = ..., context: TokenContext = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool | None = ...,
        *,
        return_routing: Literal[True],
        context: TokenContext = ...,
        streams: list[Tensor] | None = ...,
    ) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    @overload
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool | None = ...,
        return_routing: bool = ...,
        context: TokenContext = ...,
        *,
        state: Sequence[State],
        streams: list[Tensor] | None = ...,
    ) -> tuple[tuple[Tensor, list[RoutingInfo], AuxLosses | None], tuple[State, ...]]: ...
    def forward(
        self,
        x_BTD: Tensor,
        is_causal: bool | None = None,
        return_routing: bool = False,
        context: TokenContext = TokenContext(),
        state: Sequence[State] | None = None,
        *,
        streams: list[Tensor] | None = None,
    ) -> Any:
        infos: list[RoutingInfo] = []
        total: AuxLosses | None = None
        context = context._replace(embedding_BTD=x_BTD)
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"states ({len(state)}) must be as many as blocks ({len(self.blocks)})")
        new_state: list[State] = []
        halted = None if self.halting is None else self.halting.start(x_BTD)
        for index, block in enumerate(self.blocks):
            before_BTD = x_BTD
            if streams is not None:
                streams.append(x_BTD)
            if halted is not None:
                context = context._replace(is_running_BT=halted.is_running_BT)
            if state is None:
                output = block(x_BTD, is_causal, return_routing=True, context=context)
            else:
                output, of_block = block(x_BTD, is_causal, context=context, state=state[index])
                new_state.append(of_block)
            x_BTD = output.x_BTD
            if output.routing is not None:
                infos.append(output.routing)
            if output.aux is not None:
                total = output.aux if total is None else _add(total, output.aux)
            if self.halting is not None and halted is not None:
                x_BTD = torch.where(halted.is_running_BT.unsqueeze(-1), x_BTD, before_BTD)
                halted = self.halting.step(x_BTD, halted, is_last=index == len(self.blocks) - 1)
        if self.halting is not None and halted is not None:
            x_BTD = halted.mean_BTD
            total = _with_ponder(total, self.halting.ponder(halted, context.mask_BT))
        if state is not None:
            return (x_BTD, infos, total), tuple(new_state)
        return (x_BTD, infos, total) if return_routing else x_BTD


def _with_ponder(aux: AuxLosses | None, ponder: Tensor) -> AuxLosses:
    zero = torch.zeros_like(ponder)
    if aux is None:
        aux = {"balance": zero, "ternary": zero, "sparsity": zero, "diversity": zero, "total_aux": zero}
    return {**aux, "total_aux": aux["total_aux"] + ponder}


def _add(a: AuxLosses, b: AuxLosses) -> AuxLosses:
    return {
        "balance": a["balance"] + b["balance"],
        "ternary": a["ternary"] + b["ternary"],
        "sparsity": a["sparsity"] + b["sparsity"],
        "diversity": a["diversity"] + b["diversity"],
        "total_aux": a["total_aux"] + b["total_aux"],
    }


@dataclass(frozen=True)
class StackConfig:
    """Size and kind of a :class:`TriXStack`.

    Args:
        d_model: width. num_layers: blocks. n_heads: attention heads. context_length: the longest sequence, in tokens.
        ternary_attention: the projections of the mixers are ternary too. dropout: after mixer and feed-forward layer.
        ffn: the feed-forward layers.
        mixer: ``attention``, ``resolvent`` (:class:`~trix.nn.ResolventMixer`), ``ssd`` (:class:`~trix.nn.SSDMixer`), or the
            import path of a :class:`~trix.nn.Mixer`. mixer_args: what it is made with besides.
        attention_at: the places of blocks, counted from 0, that mix by attention whatever ``mixer`` says.
        halt_threshold: adaptive computation time, see :class:`~trix.nn.halting.Halting`; None: every token passes all blocks.

    Raises:
        ValueError: d_model, n_heads or context_length is < 1.
    """

    d_model: int = 128
    num_layers: int = 4
    n_heads: int = 4
    context_length: int = 128
    ternary_attention: bool = False
    dropout: float = 0.0
    ffn: FFNConfig = field(default_factory=FFNConfig)
    mixer: str = "attention"
    mixer_args: dict[str, Any] = field(default_factory=dict)
    attention_at: tuple[int, ...] = ()
    halt_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be >= 1")

    def make_stack(self) -> TriXStack:
        return TriXStack(
            self.num_layers,
            self.d_model,
            self.n_heads,
            self.ffn,
            context_length=self.context_length,
            ternary_attention=self.ternary_attention,
            dropout=self.dropout,
            mixer=self.mixer,
            mixer_args=self.mixer_args,
            attention_at=self.attention_at,
            halt_threshold=self.halt_threshold,
        )


# Names in state_dicts of checkpoint version 1, within a block. A sparse lookup had no ffn_norm, and is a sublayer itself.
_RENAMED = {"attention_norm.": "mixer.norm.", "attention.": "mixer.inner.", "ffn_norm.": "feed_forward.norm."}
_IN_BLOCK = re.compile(r"(?P<block>.*\bblocks\.\d+\.)(?P<part>attention_norm\.|attention\.|ffn_norm\.|ffn\.)(?P<rest>.*)")


def renamed_from_version_1(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """The state_dict of a stack, or of anything that holds stacks, from a checkpoint of version 1, by its present names."""
    renamed: dict[str, ValueT] = {}
    for name, value in state_dict.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            renamed[name] = value
            continue
        block, part, rest = match["block"], match["part"], match["rest"]
        is_lookup_block = f"{block}attention_norm.bias" in state_dict  # no block of a stack
        if part == "ffn." and not is_lookup_block:
            part = "feed_forward.inner." if f"{block}ffn_norm.weight" in state_dict else "feed_forward."
        renamed[block + _RENAMED.get(part, part) + rest] = value
    return renamed
