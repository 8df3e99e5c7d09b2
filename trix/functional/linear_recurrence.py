"""Complex linear recurrences over tokens, in chunks.

Legend: R rows, N tokens, Q channels, K chunks, S steps of a chunk.
"""

import torch
from torch import Tensor

CHUNK = 16


def linear_recurrence(a: Tensor, x: Tensor, first: Tensor, *, is_reversed: bool = False) -> Tensor:
    """h_i = a_i h_{i-1} + x_i with h_{-1} = first, or, reversed, h_i = a_i h_{i+1} + x_i with h_N = first.

    a [R, N], x [R, N, Q] and first [R, Q] complex -> h [R, N, Q]. No gradient.

    The states at the ends of the chunks come first, from the same recurrence over the chunks; then all chunks run at once.
    """
    h = torch.empty_like(x)
    chunk = min(CHUNK, x.shape[1])
    stop = x.shape[1] // chunk * chunk
    ranges = [slice(0, stop), slice(stop, None)] if stop < x.shape[1] else [slice(0, stop)]
    for part in reversed(ranges) if is_reversed else ranges:
        h_part = h[:, part]
        _run_chunks(a[:, part], x[:, part], first, h_part, min(chunk, h_part.shape[1]), is_reversed)
        first = h_part[:, 0 if is_reversed else -1]
    return h


def _run_chunks(a: Tensor, x: Tensor, first: Tensor, h: Tensor, chunk: int, is_reversed: bool) -> None:
    a_RKS, x_RKSQ, h_RKSQ = (z.view(len(z), -1, chunk, *z.shape[2:]) for z in (a, x, h))
    num_chunks = a_RKS.shape[1]
    before = first.unsqueeze(1)
    if num_chunks > 1:
        ends = _chunk_ends(a_RKS, x_RKSQ, first, is_reversed)
        before = torch.cat([ends[:, 1:], before] if is_reversed else [before, ends[:, :-1]], dim=1)
    steps = zip(a_RKS.unsqueeze(-1).unbind(2), x_RKSQ.unbind(2), h_RKSQ.unbind(2), strict=True)
    for a_i, x_i, h_i in reversed(list(steps)) if is_reversed else steps:
        before = torch.addcmul(x_i, a_i, before, out=h_i)


def _chunk_ends(a_RKS: Tensor, x_RKSQ: Tensor, first: Tensor, is_reversed: bool) -> Tensor:
    """The state after each chunk [R, K, Q]."""
    one = a_RKS.new_ones(1).expand(*a_RKS.shape[:2], 1)
    if is_reversed:
        decay = torch.cat([one, a_RKS], dim=-1).cumprod(-1)
        decay_RKS, whole_RK = decay[..., :-1], decay[..., -1]
    else:
        decay = torch.cat([one, a_RKS.flip(-1)], dim=-1).cumprod(-1).flip(-1)
        decay_RKS, whole_RK = decay[..., 1:], decay[..., 0]
    ends = (decay_RKS.unsqueeze(-2) @ x_RKSQ).squeeze(-2)
    return linear_recurrence(whole_RK, ends, first, is_reversed=is_reversed)


def segments(shape: torch.Size, num_values: int) -> list[slice]:
    """Slices of N that hold about num_values of a tensor [R, N, ...].

    What a segment needs at once then stays in the cache, however long the sequence is.
    """
    size = max(num_values // max(shape.numel() // shape[1], 1), 1)
    return [slice(start, min(start + size, shape[1])) for start in range(0, shape[1], size)]


def unfilled(x: Tensor) -> Tensor:
    """A contiguous tensor of this shape, dtype and device: what an operator tells a tracer of a result that is like x."""
    return x.new_empty(x.shape)


def parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """The real and the imaginary part of a complex tensor, as tensors of their own."""
    # A clone even of one value: contiguous() would give back a view of it.
    return z.real.clone(memory_format=torch.contiguous_format), z.imag.clone(memory_format=torch.contiguous_format)
