"""Mixing of tokens by the last row of the resolvent of the leading block: a complex linear recurrence with state.

With the pivots G of :mod:`trix.functional.resolvent` and the sub-diagonal c (c_i couples token i to the one before it; with
hermitian hopping w = |c|^2), the last row of the inverse of the leading block 0..i is
L_ij = G_i prod_{k=j+1}^{i} (-c_k G_{k-1}). Given G this is a scalar-decay linear recurrence per head: the structured
state-space duality of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060) with a complex decay that may exceed 1 at single tokens.

Legend: B batch, H heads, N tokens, P channels per head, n width of a query.
"""

from typing import Literal

import torch
from torch import Tensor

from trix.functional.autocast import without_autocast
from trix.functional.resolvent import Pair, check_choice, check_floats, check_like, is_empty
from trix.functional.resolvent_mix_matrix import resolvent_mix_matrix
from trix.functional.resolvent_mix_vector import resolvent_mix_vector

MixMethod = Literal["chunk", "loop"]
MIX_METHODS: tuple[MixMethod, ...] = ("chunk", "loop")


def resolvent_mix(
    G: Pair,
    c: Pair,
    u: Tensor,
    first: Pair | None = None,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    method: MixMethod = "chunk",
) -> tuple[Pair, Pair]:
    """y_i = sum_{j<=i} L_ij u_j, or with q and k sum_{j<=i} L_ij (q_i . k_j) u_j, by a recurrence over the tokens.

    Vector state: y_i = G_i (u_i - c_i y_{i-1}).
    Matrix state: S_i = G_i (k_i (x) u_i - c_i S_{i-1}), y_i = q_i S_i.

    Where w = |c|^2 (:func:`~trix.functional.resolvent.hermitian_couplings`), sqrt(eta_i) |y_i| <= (sum_{j<=i} |u_j|^2 /
    eta_j)^(1/2) in the vector form. |c_i G_i| may exceed 1 and is never clamped. c_i = 0 forgets what stood before token i.

    Args:
        G, c: pivots and couplings, float32 or float64 [B, H, N].
        u: input [B, H, N, P].
        first: state before the first token, [B, H, P] or, with q and k, [B, H, n, P]; None is 0.
        q, k: queries and keys [B, H, N, n], or [B, 1, N, n] for all heads. Both or neither.
        method: "chunk" computes in products of matrices; "loop" is the reference.

    Returns:
        y [B, H, N, P], and the state after the last token, which a later call takes as first.

    Raises:
        ValueError: shapes or dtypes that do not fit, no token, or q without k.
    """
    check_choice("method", method, MIX_METHODS)
    _check_mix(G, c, u, first, q, k)
    if first is None:
        shape = u.shape[:2] + u.shape[3:] if k is None else (*u.shape[:2], k.shape[-1], u.shape[-1])
        zero = u.new_zeros(shape)
        first = Pair(zero, zero)
    if method == "loop" or is_empty(u):
        return _mix_loop(G, c, u, first, q, k)
    with without_autocast(u):
        if q is None or k is None:
            y_re, y_im, last_re, last_im = resolvent_mix_vector(*G, *c, u, *first)
        else:
            y_re, y_im, last_re, last_im = resolvent_mix_matrix(*G, *c, u, q, k, *first)
    return Pair(y_re, y_im), Pair(last_re, last_im)


def _mix_loop(G: Pair, c: Pair, u: Tensor, first: Pair, q: Tensor | None, k: Tensor | None) -> tuple[Pair, Pair]:
    state_re, state_im = first
    over_state = (..., None) if k is None else (..., None, None)
    y_re, y_im = [], []
    for i in range(u.shape[2]):
        drive = u[:, :, i] if k is None else k[:, :, i, :, None] * u[:, :, i, None, :]
        G_re, G_im, c_re, c_im = (part[:, :, i][over_state] for part in (*G, *c))
        rest_re = drive - (c_re * state_re - c_im * state_im)
        rest_im = -(c_re * state_im + c_im * state_re)
        state_re, state_im = G_re * rest_re - G_im * rest_im, G_re * rest_im + G_im * rest_re
        q_i = None if q is None else q[:, :, i, :, None]
        y_re.append(state_re if q_i is None else (q_i * state_re).sum(dim=-2))
        y_im.append(state_im if q_i is None else (q_i * state_im).sum(dim=-2))
    return Pair(torch.stack(y_re, dim=2), torch.stack(y_im, dim=2)), Pair(state_re, state_im)


def _check_mix(G: Pair, c: Pair, u: Tensor, first: Pair | None, q: Tensor | None, k: Tensor | None) -> None:
    check_floats("u", u)
    if u.ndim != 4 or u.shape[2] == 0:
        raise ValueError(f"u {tuple(u.shape)} must be [B, H, N, P] with N >= 1 tokens")
    for name, part in zip(("Re G", "Im G", "Re c", "Im c"), (*G, *c), strict=True):
        check_like(name, part, "u", u, u.shape[:3])
    if (q is None) != (k is None):
        raise ValueError(f"q ({_given(q)}) and k ({_given(k)}) must be given together")
    state_shape = [*u.shape[:2], u.shape[3]]
    if q is not None and k is not None:
        if k.ndim != 4 or k.shape[1] not in (1, u.shape[1]):
            raise ValueError(f"k {tuple(k.shape)} must be [B, 1, N, n] or [B, H, N, n], as u {tuple(u.shape)} has B, H and N")
        check_like("k", k, "u", u, torch.Size([u.shape[0], k.shape[1], u.shape[2], k.shape[3]]))
        check_like("q", q, "k", k, k.shape)
        state_shape.insert(2, k.shape[3])
    for part in first or ():
        check_like("first", part, "u", u, torch.Size(state_shape))


def _given(x: Tensor | None) -> str:
    return "not given" if x is None else "given"
