"""Gradient checkpointing of any model that keeps its blocks in an nn.ModuleList."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """For forward passes in this context, the backward pass computes the members of the outermost nn.ModuleLists again.

    So of a block nothing but its input is kept. The backward pass itself may come after the context.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [block for module in outermost for block in module if "forward" not in vars(block)]
    for block in blocks:
        block.forward = functools.wraps(block.forward)(functools.partial(_recomputed, block, block.forward))
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(block: nn.Module, forward: Any, *args: Any, **settings: Any) -> Any:
    if not block.training or not torch.is_grad_enabled():
        return forward(*args, **settings)
    return checkpoint(forward, *args, use_reentrant=False, **settings)
