"""Causal language models of Hugging Face as backends.

B texts, T tokens of a text, D width.
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from trix.superposition.backends.base_model import DTYPES, RESIDUAL, CausalLMBackend, Site
from trix.superposition.config import DTypeName

# Keys of a configuration that say nothing about the function of the model.
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures")


class HFCausalLM(CausalLMBackend):
    """A causal language model of transformers, with its tokenizer.

    Blocks and feed-forward layers are found by structure: the blocks are the one outermost list of num_hidden_layers modules;
    the feed-forward layer is what a block holds besides attention and norms.

    Sites: ``resid_pre``, the stream that enters a block; ``mlp_in`` and ``mlp_out``, what the feed-forward layer of a block
    gets and gives, after the norm before it and before any norm behind it.

    Args:
        model: put into evaluation mode. tokenizer: its padding is set to the right, with the end of text where it has no
            padding token. config: the model's own by default.

    Raises:
        ValueError: no such list of blocks, or a tokenizer that has neither token.
    """

    sites: ClassVar[tuple[str, ...]] = (RESIDUAL, "mlp_in", "mlp_out")
    stream_sites: ClassVar[tuple[str, ...]] = (RESIDUAL, "mlp_out")

    def __init__(self, model: nn.Module, tokenizer: Any, config: Any = None) -> None:
        super().__init__(model)
        self.tokenizer: Any = tokenizer
        self.config: Any = model.config if config is None else config
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"pad_token ({tokenizer.pad_token}) and eos_token (None) of the tokenizer must not both be None"
                )
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self._blocks = _blocks(model, self.config)

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: DTypeName = "bf16", device_map: str = "auto") -> Self:
        """A model in safetensors by its folder or its name at the hub; no code of its own is run.

        Args:
            dtype: of the weights. device_map: as transformers has it; ``auto`` spreads the model over all devices where
                accelerate is installed, and otherwise takes the first GPU or the CPU.

        Raises:
            ImportError: transformers is missing. ValueError: another dtype.
            OSError: no such model, as transformers says it.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ImportError("models of Hugging Face need transformers: pip install 'trix[transformers]'") from error
        placed: dict[str, Any] = {"device_map": device_map}
        if device_map == "auto" and find_spec("accelerate") is None:
            placed = {}
        model = AutoModelForCausalLM.from_pretrained(
            model_id, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **placed
        )
        if not placed and torch.cuda.is_available():
            model = model.to("cuda")
        return cls(model, AutoTokenizer.from_pretrained(model_id, trust_remote_code=False))

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self._blocks

    @override
    def tokenize(self, texts: Sequence[str], max_len: int) -> dict[str, Tensor]:
        """As the tokenizer does it, with its special tokens.

        Raises:
            ValueError: max_len < 1.
        """
        if max_len < 1:
            raise ValueError(f"max_len ({max_len}) must be >= 1")
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=max_len, return_tensors="pt")
        # A tokenizer gives floats where all texts are empty.
        return {name: found[name].to(self.device, torch.int64) for name in ("input_ids", "attention_mask")}

    @override
    def watch(self, site: Site, shape: tuple[int, int], note: Callable[[Tensor], None]) -> tuple[RemovableHandle, ...]:
        block = self.block(site.layer)
        if site.name == RESIDUAL:
            return (_watch_input(block, shape, note),)
        layer = _feed_forward(block, site)
        if site.name == "mlp_in":
            return (_watch_input(layer, shape, note),)

        def note_output(_: nn.Module, __: Any, output: Any) -> None:
            note(_rows(output[0] if isinstance(output, tuple) else output, shape))

        return (layer.register_forward_hook(note_output),)

    @override
    def run(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(torch.int64)
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits

    @override
    @torch.no_grad()
    def generate(self, **kw: Any) -> Tensor:
        """As ``generate`` of transformers; tensors are moved to the model's device."""
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in kw.items()}
        return self.model.generate(**{"pad_token_id": self.tokenizer.pad_token_id, **moved})  # type: ignore[operator]

    @override
    def describe(self) -> str:
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _INCIDENTAL}
        return json.dumps(settings, sort_keys=True, default=str)


def _blocks(model: nn.Module, config: Any) -> list[nn.Module]:
    number = config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    depth = min((depth for depth, _, _ in lists), default=0)
    outermost = [(name, module) for place, name, module in lists if place == depth]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise ValueError(f"{type(model).__name__} must have one outermost list of num_hidden_layers ({number}) blocks: {found}")
    return list(outermost[0][1])


def _feed_forward(block: nn.Module, site: Site) -> nn.Module:
    with_matrices = {
        name: child for name, child in block.named_children() if any(parameter.ndim >= 2 for parameter in child.parameters())
    }
    others = {name: child for name, child in with_matrices.items() if "attn" not in name and "attention" not in name}
    if len(others) != 1 or len(with_matrices) == 1:
        found = ", ".join(with_matrices) or "none"
        raise ValueError(f"site ({site}) needs a block of attention and one feed-forward layer; parts with matrices: {found}")
    return next(iter(others.values()))


def _watch_input(module: nn.Module, shape: tuple[int, int], note: Callable[[Tensor], None]) -> RemovableHandle:
    def note_input(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        note(_rows(inputs[0] if inputs else named["hidden_states"], shape))

    return module.register_forward_pre_hook(note_input, with_kwargs=True)


def _rows(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, T, D]; some mixtures of experts flatten their tokens."""
    return x.reshape(*shape, x.shape[-1])
