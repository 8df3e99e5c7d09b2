"""How much a language model keeps of a text that it has read."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trix.nn import LanguageModel


@torch.no_grad()
def state_floats(model: nn.Module, num_tokens: int) -> float | None:
    """What a layer keeps of a text of num_tokens, in floats, as a mean over the layers.

    Zeros do not count: SSD and minGRU keep an imaginary part that is 0, for the sake of their frame alone.

    Args:
        model: one of trix, or what holds one, which says it by its state; one of transformers, by its cache.

    Returns:
        None for any other model, and for one of transformers that returns no cache.
    """
    inner = next((module for module in model.modules() if isinstance(module, LanguageModel)), None)
    config: Any = getattr(model, "config", None)
    if inner is None and not _has_cache(model, config):
        return None
    was_training = model.training
    model.eval()
    try:
        if inner is not None:
            token_BT = _text(inner.vocab_size, num_tokens, model)
            _, state = LanguageModel.forward(inner, token_BT, state=inner.empty_state(1))  # a subclass may answer otherwise
            parts, num_layers = [part for of_layer in state for part in of_layer], len(inner.stack.mixers)
        else:
            output = model(_text(config.vocab_size, num_tokens, model), use_cache=True)
            caches = [getattr(output, name, None) for name in ("cache_params", "past_key_values")]
            parts, num_layers = list(_floats(caches, set())), config.num_hidden_layers
            if not parts:
                return None
    finally:
        model.train(was_training)
    return sum(int(part.count_nonzero()) for part in parts) / num_layers


def _has_cache(model: nn.Module, config: Any) -> bool:
    sizes = (getattr(config, name, None) for name in ("num_hidden_layers", "vocab_size"))
    return all(isinstance(size, int) for size in sizes) and "use_cache" in inspect.signature(model.forward).parameters


def _text(vocab_size: int, num_tokens: int, model: nn.Module) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _floats(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors of floats in an object of objects, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(part, seen)
    elif not isinstance(value, type | nn.Module):
        yield from _floats(getattr(value, "__dict__", {}), seen)
