"""A small decoder-only language model of TriX blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import Tensor, nn

from trix.nn.block import StackConfig
from trix.nn.context_code import ContextCode
from trix.nn.feed_forward import FFNConfig
from trix.outputs import AuxLosses, RoutingInfo, State, StateSpec, TokenContext


@dataclass(frozen=True)
class LanguageModelConfig(StackConfig):
    """Size and kind of a :class:`LanguageModel`; see StackConfig.

    By default a layer has 64 tiles, and the last two tokens choose among them, by signatures frozen as they were drawn.
    """

    ffn: FFNConfig = field(default_factory=lambda: FFNConfig(num_tiles=64, route_on="context"))


class LanguageModel(nn.Module):
    """Embedding, TriXStack, RMSNorm, and a head that shares the embedding's matrix.

    Shape:
        token_BT: int64 in [0, vocab_size), T <= context_length -> logits [B, T, vocab_size]. With ``return_routing`` also the
        list of RoutingInfo (one per routed layer) and the summed AuxLosses (None without routed layers). With a state, from
        :meth:`empty_state` or the call before: (the same three, the new state); the P tokens of the calls before come first,
        P + T <= context_length, and only token_BT is computed. mask_BT: bool, False for padding, which nothing looks at.
        hidden_states: a list that gets the input of each block, and last what the head reads, [B, T, D] each.

    Raises:
        ValueError: vocab_size < 1, and as TriXStack.
    """

    def __init__(self, vocab_size: int, config: LanguageModelConfig | None = None) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size ({vocab_size}) must be >= 1")
        self.vocab_size, self.config = vocab_size, config or LanguageModelConfig()
        c = self.config
        self.embedding = nn.Embedding(vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, std=c.d_model**-0.5)  # logits of unit scale: the head shares the matrix
        self.stack = c.make_stack()
        self.context_code = c.ffn.make_code(ContextCode, vocab_size, c.d_model) if self.stack.reads_code else None
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def state_specs(self) -> list[tuple[StateSpec, ...]]:
        """What each block keeps of the tokens that it has read, and last what the codes of contexts keep, if there are any."""
        specs = [mixer.state_specs() for mixer in self.stack.mixers]
        return specs if self.context_code is None else [*specs, self.context_code.state_specs()]

    def empty_state(self, batch_size: int) -> tuple[State, ...]:
        """The state before the first token."""
        state = self.stack.empty_state(batch_size)
        return state if self.context_code is None else (*state, self.context_code.empty_state(batch_size))

    @overload
    def forward(self, token_BT: Tensor, return_routing: Literal[False] = ..., *, mask_BT: Tensor | None = ...) -> Tensor: ...
    @overload
    def forward(
        self,
        token_BT: Tensor,
        return_routing: Literal[True],
        *,
        mask_BT: Tensor | None = ...,
        hidden_states: list[Tensor] | None = ...,
    ) -> tuple[Tensor, list[RoutingInfo], AuxLosses | None]: ...
    @overload
    def forward(
        self,
        token_BT: Tensor,
        return_routing: bool = ...,
        *,
        state: Sequence[State],
        hidden_states: list[Tensor] | None = ...,
    ) -> tuple[tuple[Tensor, list[RoutingInfo], AuxLosses | None], tuple[State, ...]]: ...
    def forward(
        self,
        token_BT: Tensor,
        return_routing: bool = False,
        state: Sequence[State] | None = None,
        mask_BT: Tensor | None = None,
        *,
        hidden_states: list[Tensor] | None = None,
    ) -> Any:
        x_BTD, context = self.embedding(token_BT), TokenContext(token_BT, mask_BT)
        new_state: tuple[State, ...] | None = None
        of_code: tuple[State, ...] = ()
        if self.context_code is not None:
            before = None
            if state is not None:
                state, before = state[:-1], state[-1] if state else ()
            code_BTD, ids = self.context_code(token_BT, mask_BT, before)
            context, of_code = context._replace(code_BTD=code_BTD), (ids,)
        if state is not None:
            (x_BTD, infos, aux), new_state = self.stack(x_BTD, context=context, state=state, streams=hidden_states)
            new_state = (*new_state, *of_code)
        else:
            x_BTD, infos, aux = self.stack(x_BTD, return_routing=True, context=context, streams=hidden_states)
        x_BTD = self.norm(x_BTD)
        if hidden_states is not None:
            hidden_states.append(x_BTD)
        logits = self.head(x_BTD)
        if state is not None:
            return (logits, infos, aux), new_state
        return (logits, infos, aux) if return_routing else logits
