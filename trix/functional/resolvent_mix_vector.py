"""Resolvent mixing with a vector as state: y_i = G_i (u_i - c_i y_{i-1}).

Legend: B batch, H heads, N tokens, P channels per head, R = B H rows.
"""

import torch
from torch import Tensor

from trix.functional.linear_recurrence import linear_recurrence, parts, segments, unfilled

SEGMENT_VALUES = 2**18


@torch.library.custom_op("trix::resolvent_mix", mutates_args=())
def resolvent_mix_vector(
    G_re: Tensor, G_im: Tensor, c_re: Tensor, c_im: Tensor, u: Tensor, first_re: Tensor, first_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_i = G_i (u_i - c_i y_{i-1}), y_{-1} = first.

    G, c [B, H, N], u [B, H, N, P], first [B, H, P] -> the two parts of y [B, H, N, P], and those of the last y [B, H, P].
    """
    G, A, u_RNP = _rows(G_re, G_im, c_re, c_im, u)
    y_re, y_im = u.new_empty(u_RNP.shape), u.new_empty(u_RNP.shape)
    state = torch.complex(first_re, first_im).reshape(len(G), -1)
    for part in segments(u_RNP.shape, SEGMENT_VALUES):
        h = linear_recurrence(A[:, part], G[:, part].unsqueeze(-1) * u_RNP[:, part], state)
        y_re[:, part], y_im[:, part] = h.real, h.imag
        state = h[:, -1]
    return y_re.view(u.shape), y_im.view(u.shape), *parts(state.reshape(first_re.shape))


def _rows(G_re: Tensor, G_im: Tensor, c_re: Tensor, c_im: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G and A = -c G, complex [R, N], and u [R, N, P]."""
    G, c = torch.complex(G_re, G_im).reshape(-1, u.shape[2]), torch.complex(c_re, c_im).reshape(-1, u.shape[2])
    return G, -c * G, u.reshape(-1, *u.shape[2:])


@torch.library.custom_op("trix::resolvent_mix_backward", mutates_args=())
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
    first_re: Tensor,
    first_im: Tensor,
    y_re: Tensor,
    y_im: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs, in their order.

    With A_i = -c_i G_i, the whole gradient of y_i is p_i = grad_i + conj(A_{i+1}) p_{i+1}. That of u_i is Re(conj(G_i) p_i), of
    A_i sum_P p_i conj(y_{i-1}), of G_i as the factor of u_i sum_P p_i u_i.
    """
    G, A, u_RNP = _rows(G_re, G_im, c_re, c_im, u)
    num_rows = len(G)
    decay = torch.cat([A[:, 1:].conj_physical(), A.new_ones(num_rows, 1)], dim=1)
    grad_re, grad_im, y_re, y_im = (x.reshape(u_RNP.shape) for x in (grad_re, grad_im, y_re, y_im))
    first = torch.complex(first_re, first_im).reshape(num_rows, 1, -1)
    grad_u, grad_G, grad_A = u.new_empty(u_RNP.shape), torch.empty_like(G), torch.empty_like(A)
    p_after = torch.complex(grad_last_re, grad_last_im).reshape(num_rows, -1)
    for part in reversed(segments(u_RNP.shape, SEGMENT_VALUES)):
        p = linear_recurrence(decay[:, part], torch.complex(grad_re[:, part], grad_im[:, part]), p_after, is_reversed=True)
        p_after = p[:, 0]
        G_part, u_part = G[:, part].unsqueeze(-1), u_RNP[:, part]
        grad_u[:, part] = G_part.real * p.real + G_part.imag * p.imag
        grad_G[:, part] = (p * u_part).sum(-1)
        before = slice(max(part.start - 1, 0), part.stop - 1)
        y_before = torch.complex(y_re[:, before], y_im[:, before])
        if part.start == 0:
            y_before = torch.cat([first, y_before], dim=1)
        grad_A[:, part] = (p * y_before.conj_physical()).sum(-1)
    grad_G -= grad_A * torch.complex(c_re, -c_im).reshape(G.shape)
    grad_c = -grad_A * G.conj_physical()
    grad_first = A[:, :1].conj_physical() * p_after
    grad_G, grad_c = grad_G.view(c_re.shape), grad_c.view(c_re.shape)
    return *parts(grad_G), *parts(grad_c), grad_u.view(u.shape), *parts(grad_first.view(first_re.shape))


@resolvent_mix_vector.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    *_, u, first_re, first_im = inputs
    return unfilled(u), unfilled(u), unfilled(first_re), unfilled(first_im)


@_mix_backward.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(unfilled, inputs[4:-2]))  # those of the forward


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    y_re, y_im, _, _ = output
    ctx.save_for_backward(*inputs, y_re, y_im)


def _backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
    return _mix_backward(*grads, *ctx.saved_tensors)  # type: ignore[attr-defined]


resolvent_mix_vector.register_autograd(_backward, setup_context=_save_for_backward)
