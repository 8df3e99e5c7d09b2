"""What every model is to the rest of the package: texts to tokens, tokens to activations at named sites.

B texts, T tokens of a text, D width.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trix.superposition.config import DTypeName

RESIDUAL = "resid_pre"
_STREAM = ("hidden_states", "x_BTD")  # what blocks call their first argument
DTYPES: dict[DTypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Site(NamedTuple):
    """A place in a model, written ``resid_pre.13``: the block, counted from 0, and what of it is read."""

    layer: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The site of a text like ``resid_pre.13``.

        Raises:
            ValueError: another form.
        """
        name, _, layer = text.rpartition(".")
        if not name.isidentifier() or not (layer.isascii() and layer.isdigit()):
            raise ValueError(f"site ({text!r}) must be NAME.LAYER, as resid_pre.13")
        return cls(int(layer), name)


class _EndOfRun(Exception):  # noqa: N818 (no error: all that was asked for is known)
    """Ends the forward of a model at its last site."""


class CausalLMBackend(ABC):
    """A causal language model whose activations can be read; the model is put into evaluation mode.

    A subclass says where its blocks are, how a site of one is watched, and how the model is run; what is read, and that nothing
    is computed beyond it, is said here.

    Args:
        model: the whole model.

    Class attributes:
        sites: names of sites whose activations are vectors; ``resid_pre`` is the residual stream that enters a block.
        stream_sites: those of them whose vectors are the residual stream or are added to it as they are.
        has_sinks: attention gathers at the first position of a text, whose activations dwarf all others.
    """

    sites: ClassVar[tuple[str, ...]] = (RESIDUAL,)
    stream_sites: ClassVar[tuple[str, ...]] = (RESIDUAL,)
    has_sinks: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the model, in order."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str], max_len: int) -> dict[str, Tensor]:
        """Token ids of texts, each cut after max_len tokens, padded on the right.

        Returns:
            input_ids and attention_mask, both int64 [B, T], on the model's device; the mask is 0 for padding.
        """

    @abstractmethod
    def watch(self, site: Site, shape: tuple[int, int], note: Callable[[Tensor], None]) -> tuple[RemovableHandle, ...]:
        """Call ``note`` with what the model computes at the site, until the handles are removed.

        Args:
            shape: B and T. note: gets [B, T, D], or [B, T] of a column; it may raise, to end the run.
        """

    @abstractmethod
    def run(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Run the model once: its logits, [B, T, vocabulary]. mask: bool [B, T], or None without padding."""

    @abstractmethod
    def generate(self, **kw: Any) -> Tensor:
        """The prompts ``input_ids`` and their continuations, int64 [B, T]; ``max_new_tokens`` and others as the model has
        them.
        """

    @abstractmethod
    def describe(self) -> str:
        """All that the function of the model depends on besides its weights, as text: part of its digest."""

    @property
    def device(self) -> torch.device:
        """Where the model's first weight is."""
        return next(self.model.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def block(self, layer: int) -> nn.Module:
        """Block ``layer``, counted from 0: the one place for hooks.

        Raises:
            ValueError: layer < 0 or >= num_layers.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer ({layer}) must be >= 0 and < number of layers ({self.num_layers})")
        return self.blocks[layer]

    def columns(self, layer: int) -> Mapping[str, torch.dtype]:  # noqa: ARG002 (subclasses differ by layer)
        """What else a dump keeps of each token at this layer: sites that :meth:`activations` gives as [B, T]."""
        return {}

    def forward_hidden(self, input_ids: Tensor, attention_mask: Tensor | None, layer: int) -> Tensor:
        """The residual stream that enters block ``layer``, [B, T, D] in the model's dtype; neither that block nor anything
        after it is computed. It is what transformers calls ``hidden_states[layer]``, less the last, which is after the final
        norm.

        Raises:
            ValueError: as :meth:`activations`.
        """
        site = Site(layer, RESIDUAL)
        return self.activations(input_ids, attention_mask, [site])[site]

    @torch.no_grad()
    def activations(self, input_ids: Tensor, attention_mask: Tensor | None, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """What one run of the model computes at the sites; it ends at the last of them.

        Args:
            input_ids: int64 [B, T]. attention_mask: [B, T], 0 for padding; None: there is none.

        Returns:
            Copies, [B, T, D] in the model's dtype, [B, T] of a column. Values at padding mean nothing.

        Raises:
            ValueError: no sites, a site that the model lacks, or a mask of another shape.
        """
        if not sites:
            raise ValueError(f"number of sites ({len(sites)}) must be >= 1")
        for site in sites:
            self.block(site.layer)
            names = (*self.sites, *self.columns(site.layer))
            if site.name not in names:
                raise ValueError(f"site ({site}) must be one of {', '.join(names)} at layer {site.layer}")
        shape, mask = (input_ids.shape[0], input_ids.shape[1]), _mask(input_ids, attention_mask)
        noted: dict[Site, Tensor] = {}
        wanted = dict.fromkeys(sites)
        handles: list[RemovableHandle] = []

        def note(site: Site, value: Tensor) -> None:
            if site in noted:
                return
            noted[site] = value.detach()
            if len(noted) == len(wanted):
                raise _EndOfRun
            noted[site] = noted[site].clone()  # the run goes on, and some models add to the stream in place

        try:
            for site in wanted:
                handles += self.watch(site, shape, partial(note, site))
            with suppress(_EndOfRun):
                self.run(input_ids.to(self.device), None if mask is None else mask.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        missing = [str(site) for site in wanted if site not in noted]
        if missing:
            raise ValueError(f"sites ({', '.join(missing)}) must take part in a run of {type(self.model).__name__}")
        return {site: noted[site] for site in wanted}

    @torch.no_grad()
    def unembed(self, x_ND: Tensor) -> Tensor:
        """Logits of streams that leave the last block, float32 [N, vocabulary]: the final norm and the head, and all else that
        the model does after its blocks. x_ND: float [N, D].
        """
        replaced_N1D = x_ND.unsqueeze(1)

        def replace(_: nn.Module, __: Any, output: Any) -> Any:
            new = replaced_N1D.to(output[0] if isinstance(output, tuple) else output)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.blocks[-1].register_forward_hook(replace)
        try:  # what the blocks make of the token 0 is thrown away
            return self.run(torch.zeros(len(x_ND), 1, dtype=torch.int64, device=self.device), None)[:, 0].float()
        finally:
            handle.remove()

    def digest(self) -> str:
        """SHA-256, in hex, of the model's weights and buffers and of what :meth:`describe` says."""
        total = hashlib.sha256(f"{type(self.model).__qualname__}\n{self.describe()}\n".encode())
        for name, value in sorted(self.model.state_dict().items()):
            if isinstance(value, Tensor):
                total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def replace_stream(block: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Give a block ``change(x_BTD)`` in place of the stream x_BTD that enters it, until the handle is removed."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = next((name for name in _STREAM if name in named), None)
        if name is None:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, name: change(named[name])}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} must be [texts, tokens], each >= 1")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask
