"""Resolvent mixing with a matrix as state: S_i = G_i (k_i (x) u_i - c_i S_{i-1}), y_i = q_i S_i, in products of matrices.

Within a chunk, A_i = -c_i G_i is r_i times a unit number e_i, and E_i is the product of the e up to i. Then
y_i = E_i z_i with z = (M * q k^T) x + (b q) S, where x_j = conj(E_j) G_j u_j, M_ij = prod_{k=j+1}^{i} r_k, b_i = M_i0 r_0 and S
the state before the chunk: M is real, and all products are of real matrices, the parts of a complex number in two columns.
M is built from products alone, not from differences of logarithms: r_i may be 0, which cuts, or exceed 1.

Legend: B batch, H heads (1 for q and k that all share), N tokens, P channels per head, n width of a query, K chunks, C tokens
of a chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional.linear_recurrence import linear_recurrence, parts, segments, unfilled

CHUNK = 32
SEGMENT_SITES = 2**13


def decay_matrix(r: Tensor) -> Tensor:
    """M_ij = prod_{k=j+1}^{i} r_k for i >= j, else 0: r [..., C], C a power of 2 -> [..., C, C]."""
    chunk = r.shape[-1]
    M = torch.diag_embed(torch.ones_like(r))
    size = 1
    while size < chunk:
        # The block below two diagonal blocks is a column of the one times a row of the other.
        blocks, start = _diagonal_blocks(M, 2 * size), r[..., size :: 2 * size].unsqueeze(-1)
        column, row = blocks[..., size:, size] * start, blocks[..., size - 1, :size]
        torch.mul(column.unsqueeze(-1), row.unsqueeze(-2), out=blocks[..., size:, :size])
        size *= 2
    return M


def _diagonal_blocks(M: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal of M [..., C, C]: [..., C / size, size, size]."""
    num_blocks = M.shape[-1] // size
    blocks = M.view(*M.shape[:-2], num_blocks, size, num_blocks, size).diagonal(dim1=-4, dim2=-2)
    return blocks.movedim(-1, -3)


def _in_columns(z: Tensor) -> Tensor:
    """Complex [..., P] as real [..., 2 P]."""
    return torch.view_as_real(z).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    """Real [..., 2 P] as complex [..., P]."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


class _Sequence(NamedTuple):
    """The inputs in whole chunks: G, A = -c G complex [B, H, K, C]; u [B, H, K, C, P]; q, k [B, H or 1, K, C, n].

    The tokens that fill the last chunk leave the state as it is.
    """

    G: Tensor
    A: Tensor
    u: Tensor
    q: Tensor
    k: Tensor

    @classmethod
    def of(cls, G: Tensor, c: Tensor, u: Tensor, q: Tensor, k: Tensor) -> "_Sequence":
        num_tokens = u.shape[2]
        chunk = min(CHUNK, 1 << (num_tokens - 1).bit_length())
        fill = -num_tokens % chunk
        A = F.pad(-c * G, (0, fill), value=1.0)
        filled = [F.pad(G, (0, fill)), A, *(F.pad(x, (0, 0, 0, fill)) if fill else x for x in (u, q, k))]
        return cls(*(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]) for x in filled))

    def chunks(self, part: slice) -> "_Chunks":
        return _Chunks(*(x[:, :, part] for x in self))


class _Chunks:
    """What forward and backward need of some chunks, in the terms of the formula above."""

    def __init__(self, G: Tensor, A: Tensor, u: Tensor, q: Tensor, k: Tensor) -> None:
        self.G, self.u, self.q, self.k = G, u, q, k
        self.r = A.abs()
        self.e = A.sgn().masked_fill_(self.r == 0, 1.0)
        self.E = self.e.cumprod(-1)
        self.M = decay_matrix(self.r)
        self.b = self.M[..., 0] * self.r[..., :1]
        self.x = (self.E.conj_physical() * G).unsqueeze(-1) * u
        self.decay = (self.E * self.b)[..., -1]  # of the whole chunk

    def states(self, before: Tensor) -> Tensor:
        """The state before each chunk and after the last: complex [B, H, K + 1, n, P], from the first [B, H, n, P]."""
        k_late = self.k * self.M[..., -1, :].unsqueeze(-1)
        own = self.E[..., -1, None, None] * _complex(k_late.mT @ _in_columns(self.x))
        after = linear_recurrence(self.decay.flatten(0, 1), own.flatten(3).flatten(0, 1), before.flatten(2).flatten(0, 1))
        return torch.cat([before.unsqueeze(2), after.reshape(own.shape)], dim=2)

    def state_gradients(self, grad_z: Tensor, grad_after: Tensor) -> Tensor:
        """The gradient of the state before each chunk and after the last: as states, from that of the last [B, H, n, P]."""
        own = _complex((self.b.unsqueeze(-1) * self.q).mT @ _in_columns(grad_z))
        rows = (self.decay.conj_physical().flatten(0, 1), own.flatten(3).flatten(0, 1), grad_after.flatten(2).flatten(0, 1))
        return torch.cat([linear_recurrence(*rows, is_reversed=True).reshape(own.shape), grad_after.unsqueeze(2)], dim=2)

    def outputs(self, states: Tensor) -> Tensor:
        """y, complex [B, H, K, C, P], from the state before each chunk."""
        z = (self.M * (self.q @ self.k.mT)) @ _in_columns(self.x)
        z += (self.b.unsqueeze(-1) * self.q) @ _in_columns(states)
        return self.E.unsqueeze(-1) * _complex(z)


@torch.library.custom_op("trix::resolvent_mix_matrix", mutates_args=())
def resolvent_mix_matrix(
    G_re: Tensor,
    G_im: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    first_re: Tensor,
    first_im: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_i = G_i (k_i (x) u_i - c_i S_{i-1}), S_{-1} = first, y_i = q_i S_i.

    G, c [B, H, N], u [B, H, N, P], q, k [B, H or 1, N, n], first [B, H, n, P] -> the two parts of y [B, H, N, P], and those of
    the last S [B, H, n, P].
    """
    G, c, state = torch.complex(G_re, G_im), torch.complex(c_re, c_im), torch.complex(first_re, first_im)
    if u.shape[2] == 1:  # a step of decoding
        state = G.unsqueeze(-1) * (k.mT * u - c.unsqueeze(-1) * state)
        return *parts((q.mT * state).sum(2, keepdim=True)), *parts(state)
    sequence = _Sequence.of(G, c, u, q, k)
    y_re, y_im = torch.empty_like(sequence.u), torch.empty_like(sequence.u)
    for part in _segments(sequence):
        chunks = sequence.chunks(part)
        states = chunks.states(state)
        y = chunks.outputs(states[:, :, :-1])
        y_re[:, :, part], y_im[:, :, part] = y.real, y.imag
        state = states[:, :, -1]
    return _tokens(y_re, u.shape[2]), _tokens(y_im, u.shape[2]), *parts(state)


def _segments(sequence: _Sequence) -> list[slice]:
    """Slices of the chunks."""
    return segments(sequence.A.flatten(0, 1).shape, SEGMENT_SITES)


def _tokens(x: Tensor, num_tokens: int) -> Tensor:
    """[B, H, K, C, ...] as [B, H, N, ...]."""
    return x.flatten(2, 3)[:, :, :num_tokens].contiguous()


@torch.library.custom_op("trix::resolvent_mix_matrix_backward", mutates_args=())
def _mix_backward(
    grad_re: Tensor,
    grad_im: Tensor,
    grad_last_re: Tensor,
    grad_last_im: Tensor,
    G_re: Tensor,
    G_im: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    first_re: Tensor,
    first_im: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs, in their order. The states are computed anew, a segment at a time."""
    G, c = torch.complex(G_re, G_im), torch.complex(c_re, c_im)
    sequence = _Sequence.of(G, c, u, q, k)
    grad_y = torch.complex(*(_as_chunks(x, sequence) for x in (grad_re, grad_im)))
    grads = _Sequence(*(torch.empty_like(x) for x in sequence))
    slices, befores = _segments(sequence), [torch.complex(first_re, first_im)]
    for part in slices[:-1]:
        befores.append(sequence.chunks(part).states(befores[-1])[:, :, -1])
    grad_state = torch.complex(grad_last_re, grad_last_im)
    for part, before in zip(reversed(slices), reversed(befores), strict=True):
        chunks = sequence.chunks(part)
        grad_z = chunks.E.conj_physical().unsqueeze(-1) * grad_y[:, :, part]
        grad_states = chunks.state_gradients(grad_z, grad_state)
        found = _chunk_gradients(chunks, grad_z, chunks.states(before)[:, :, :-1], grad_states[:, :, 1:])
        for grad, value in zip(grads, found, strict=True):
            grad[:, :, part] = value
        grad_state = grad_states[:, :, 0]
    grad_G, grad_A, grad_u, grad_q, grad_k = (_tokens(x, u.shape[2]) for x in grads)
    grad_G -= grad_A * c.conj_physical()
    grad_c = -grad_A * G.conj_physical()
    return *parts(grad_G), *parts(grad_c), grad_u, grad_q, grad_k, *parts(grad_state)


def _as_chunks(x: Tensor, sequence: _Sequence) -> Tensor:
    return F.pad(x, (0, 0, 0, sequence.u.shape[2:4].numel() - x.shape[2])).reshape(sequence.u.shape)


def _chunk_gradients(chunks: _Chunks, grad_z: Tensor, before: Tensor, grad_after: Tensor) -> _Sequence:
    """Gradients of the inputs of some chunks, from those of z [B, H, K, C, P] and of the states after [B, H, K, n, P].

    A is varied as e (r + delta) with a complex delta and a fixed e: exact where r is 0, too. So M and b have complex gradients,
    whose parts are stacked as [B, H, K, 2, ...].
    """
    M, b, q, k, E = chunks.M, chunks.b, chunks.q, chunks.k, chunks.E
    agreement, late = q @ k.mT, M[..., -1, :].unsqueeze(-1)
    x = _in_columns(chunks.x)
    grad_z_parts = _with_turned(grad_z)
    grad_own_parts = _with_turned(E[..., -1, None, None].conj_physical() * grad_after)
    grad_z_columns, grad_own = grad_z_parts[:, :, :, 0], grad_own_parts[:, :, :, 0]

    grad_M = _split_rows(grad_z_parts.flatten(3, 4) @ x.mT)
    grad_agreement = _over_heads(M * grad_M[:, :, :, 0], agreement)
    grad_M *= agreement.unsqueeze(3)
    read = _split_rows(grad_z_parts.flatten(3, 4) @ _in_columns(before).mT)
    written = _split_rows(grad_own_parts.flatten(3, 4) @ x.mT).mT

    grad_q = grad_agreement @ k + _over_heads(b.unsqueeze(-1) * read[:, :, :, 0], q)
    grad_k = grad_agreement.mT @ q + _over_heads(late * written[:, :, :, 0], k)
    grad_x = (M * agreement).mT @ grad_z_columns
    grad_x += (late * k) @ grad_own
    grad_b = (read * q.unsqueeze(3)).sum(-1)
    grad_decay = E[..., -1].conj_physical() * (grad_after * before.conj_physical()).sum((-1, -2))
    grad_b[..., -1] += torch.view_as_real(grad_decay)
    grad_M[..., -1, :] += (written * k.unsqueeze(3)).sum(-1)
    grad_M[..., 0] += grad_b * chunks.r[..., None, :1]
    grad_r = _decay_gradient(grad_M, M)
    grad_r[..., 0] += (grad_b * M[..., 0].unsqueeze(3)).sum(-1)

    grad_drive = E.unsqueeze(-1) * _complex(grad_x)
    grad_u = (chunks.G.conj_physical().unsqueeze(-1) * grad_drive).real
    grad_G = (grad_drive * chunks.u).sum(-1)
    return _Sequence(grad_G, chunks.e * torch.complex(*grad_r.unbind(3)), grad_u, grad_q, grad_k)


def _decay_gradient(grad_M: Tensor, M: Tensor) -> Tensor:
    """The gradient of r [B, H, K, 2, C]: that of r_k is the sum over i >= k > j of M_ik grad_M_ij M_{k-1,j}."""
    after_j = _split_rows(grad_M.flatten(3, 4) @ M.mT)
    return F.pad((M[..., 1:].unsqueeze(3) * after_j[..., :-1]).sum(-2), (1, 0))


def _with_turned(z: Tensor) -> Tensor:
    """z and -i z in columns: complex [B, H, K, ., P] -> [B, H, K, 2, ., 2 P]. Their products with x are Re and Im z conj(x)."""
    return _in_columns(torch.stack([z, -1j * z], dim=3))


def _split_rows(x: Tensor) -> Tensor:
    """[B, H, K, 2 m, .] as [B, H, K, 2, m, .]."""
    return x.view(*x.shape[:3], 2, -1, x.shape[-1])


def _over_heads(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.shape[1] == like.shape[1] else grad.sum(1, keepdim=True)


@resolvent_mix_matrix.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    u, first_re, first_im = inputs[4], *inputs[-2:]
    return unfilled(u), unfilled(u), unfilled(first_re), unfilled(first_im)


@_mix_backward.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(unfilled, inputs[4:]))  # those of the forward


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
    return _mix_backward(*grads, *ctx.saved_tensors)  # type: ignore[attr-defined]


resolvent_mix_matrix.register_autograd(_backward, setup_context=_save_for_backward)
