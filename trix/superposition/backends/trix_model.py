"""TriX language models as backends.

B texts, T tokens of a text, D width, V vocabulary, E tiles, K chosen tiles.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from trix.introspection.capture import Note, note_decision
from trix.nn import LanguageModel, TriXBlock
from trix.nn.routed_layer import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.superposition.backends.base_model import RESIDUAL, CausalLMBackend, Site

TILE, SCORE = "tile", "score"


class TriXBackend(CausalLMBackend):
    """A :class:`trix.nn.LanguageModel` over characters; of a :class:`trix.resnet_bk.LanguageModel`, give its ``model``.

    A checkpoint of ``trix fit`` is read by :func:`lightning_modules.tasks.backend.backend_from_checkpoint`.

    Sites: ``resid_pre``, the stream that enters a block; ``resid_mid``, the stream after the mixer; ``router_in``, what the
    router of the layer compares with its signatures; ``ffn_out``, what the feed-forward layer adds to the stream. Columns of a
    layer with tiles: ``tile``, int64, the best tile of a token, and ``score``, float32, its score.

    Args:
        model: put into evaluation mode. vocabulary: the characters, in the order of their token ids.

    Raises:
        ValueError: a vocabulary with a character twice, or of another size than the model's.
    """

    sites: ClassVar[tuple[str, ...]] = (RESIDUAL, "resid_mid", "router_in", "ffn_out")
    stream_sites: ClassVar[tuple[str, ...]] = (RESIDUAL, "resid_mid", "ffn_out")
    has_sinks: ClassVar[bool] = False  # first positions are dropped from models of Hugging Face alone
    model: LanguageModel

    def __init__(self, model: LanguageModel, vocabulary: str) -> None:
        super().__init__(model)
        self.vocabulary = vocabulary
        self._id_of = {character: idx for idx, character in enumerate(vocabulary)}
        if not len(self._id_of) == len(vocabulary) == model.vocab_size:
            raise ValueError(
                f"vocabulary ({len(vocabulary)} characters, {len(self._id_of)} distinct) must be the {model.vocab_size} "
                "tokens of the model"
            )

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.stack.blocks)

    @override
    def columns(self, layer: int) -> Mapping[str, torch.dtype]:
        is_routed = isinstance(cast(TriXBlock, self.block(layer)).ffn, RoutedLayer)
        return {TILE: torch.int64, SCORE: torch.float32} if is_routed else {}

    @override
    def tokenize(self, texts: Sequence[str], max_len: int) -> dict[str, Tensor]:
        """The characters of each text.

        Raises:
            ValueError: max_len above the model's context_length, or a character outside the vocabulary.
        """
        limit = self.model.config.context_length
        if not 1 <= max_len <= limit:
            raise ValueError(f"max_len ({max_len}) must be >= 1 and <= context_length ({limit}) of the model")
        rows = [[self._id_of.get(character, -1) for character in text[:max_len]] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if -1 in row:
                raise ValueError(f"characters of {text[:40]!r} ({text[row.index(-1)]!r}) must be in the model's vocabulary")
        length = max(map(len, rows), default=0)
        id_BT = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        return {"input_ids": id_BT.to(self.device), "attention_mask": mask_BT.to(self.device)}

    @override
    def watch(self, site: Site, shape: tuple[int, int], note: Callable[[Tensor], None]) -> tuple[RemovableHandle, ...]:
        block = cast(TriXBlock, self.block(site.layer))
        if site.name == RESIDUAL:
            return (block.register_forward_pre_hook(lambda _, inputs: note(inputs[0])),)
        if site.name == "resid_mid":
            return (block.mixer.register_forward_hook(lambda _, __, output: note(output[0])),)
        if block.ffn is None:
            raise ValueError(f"site ({site}) needs a feed-forward layer, which the block lacks")
        if site.name == "ffn_out":
            return (_watch_output(block.ffn, note),)
        if not isinstance(block.ffn, RoutedLayer):
            raise ValueError(f"site ({site}) needs a layer with tiles, got {type(block.ffn).__name__}")
        return _watch_router(block.ffn, site.name, shape, note)

    @override
    def run(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(input_ids, mask_BT=mask)

    @override
    @torch.no_grad()
    def unembed(self, x_ND: Tensor) -> Tensor:  # not by way of the last block: with halting the stream is a mean of blocks
        weight = self.model.head.weight
        logits_NV: Tensor = self.model.head(self.model.norm(x_ND.to(weight)))
        return logits_NV.float()

    @override
    @torch.no_grad()
    def generate(self, **kw: Any) -> Tensor:
        """The prompts and their continuations, int64 [B, T + max_new_tokens].

        Args:
            input_ids: int64 [B, T]. attention_mask: all 1, as prompts of one call are of one length. max_new_tokens: 20 by
                default. temperature: 0, the default, takes the likeliest token. generator: source of the random numbers.

        Raises:
            ValueError: a mask with a 0, temperature < 0, T + max_new_tokens > context_length; TypeError: another argument.
        """
        return self._generate(**kw)

    def _generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if attention_mask is not None and not bool(attention_mask.all()):
            num_padded = int((attention_mask == 0).sum())
            raise ValueError(f"attention_mask (0 at {num_padded} tokens) must be 1: give prompts of one length at a time")
        if temperature < 0:
            raise ValueError(f"temperature ({temperature}) must be >= 0")
        new_BT = input_ids.to(self.device)
        tokens, state = [new_BT], self.model.empty_state(len(new_BT))
        for _ in range(max_new_tokens):
            (logits_BTV, _, _), state = self.model(new_BT, state=state)
            last_BV = logits_BTV[:, -1].float()
            if temperature == 0:
                new_BT = last_BV.argmax(-1, keepdim=True)
            else:
                new_BT = torch.multinomial((last_BV / temperature).softmax(-1), 1, generator=generator)
            tokens.append(new_BT)
        return torch.cat(tokens, dim=1)

    @override
    def describe(self) -> str:
        return f"{self.model.config!r}\n{self.vocabulary!r}"


def _watch_output(ffn: nn.Module, note: Callable[[Tensor], None]) -> RemovableHandle:
    def note_update(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        note(y - inputs[0] if isinstance(ffn, SparseLookupFFN) else y)  # a sparse lookup adds its update to x itself

    return ffn.register_forward_hook(note_update)


def _watch_router(
    layer: RoutedLayer, name: str, shape: tuple[int, int], note: Callable[[Tensor], None]
) -> tuple[RemovableHandle, ...]:
    notes: list[Note] = []
    noting = note_decision(layer, notes)
    decides = layer if isinstance(layer, SparseLookupFFN) else layer.router

    def note_last(*_: Any) -> None:
        x_TD, decision = notes.pop()
        tile_T1 = decision.tile_idx[:, :1]
        if name == TILE:
            note(tile_T1.reshape(shape))
        elif name == SCORE:
            note(decision.score.gather(1, tile_T1).reshape(shape).float())
        else:
            note(x_TD.reshape(*shape, -1))

    return noting, decides.register_forward_hook(note_last)  # called in this order
