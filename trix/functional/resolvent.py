"""Diagonal entries of the resolvent of a tridiagonal operator, token by token.

Token i has a diagonal entry alpha_i = a_i + v_i - lambda - i eta_i with eta_i > 0, and couples to the token before it with
w_i >= 0, the product of the two off-diagonal entries. w_0 couples to the state before the first token; w_i = 0 starts a new
document at token i. Complex tensors travel as :class:`Pair`, two real tensors: torch's complex arithmetic rounds differently in
vector code and in the rest of a row, so a token's value would depend on how many follow it.

Legend: N tokens.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trix.functional.resolvent_sweep import resolvent_sweep, scan_pivots


class Pair(NamedTuple):
    """A complex tensor as two real ones of one shape and dtype: re + i im."""

    re: Tensor
    im: Tensor


Method = Literal["chunk", "loop", "scan"]
METHODS: tuple[Method, ...] = ("chunk", "loop", "scan")


def resolvent_pivots(alpha: Pair, w: Tensor | None, first: Pair | None = None, *, method: Method = "chunk") -> Pair:
    """G_i = 1 / (alpha_i - w_i G_{i-1}): the last diagonal entry of the inverse of the leading block 0..i. Causal, O(N).

    |G_i| <= 1 / eta_i and Im G_i > 0 for every w >= 0, so nothing is clamped.

    Args:
        alpha: diagonal, float32 or float64 [..., N], with -eta as its imaginary part.
        w: couplings [..., N]; None couples nothing: G = 1 / alpha.
        first: G before the first token [...], such as the last G of the text so far; None is 0: nothing stands before.
        method: "chunk" has the fewest steps for its O(N) work; "loop" takes N steps and is the reference; "scan" has log2 N
            steps and O(N log N) work.

    Returns:
        G [..., N]. By every method, a token's value is the same to the last bit whatever follows it and whatever else is in the
        batch; and after a reset, also whatever stood before.

    Raises:
        ValueError: eta <= 0 or w < 0 for any token, Im first < 0, a value that is not finite, no token, or shapes or dtypes
            that differ. Values are not looked at in a compiled or exported program.
    """
    check_choice("method", method, METHODS)
    _check_pivots(alpha, w, first)
    if w is None:
        return _reciprocal(alpha)
    if first is None:
        zero = torch.zeros_like(alpha.re[..., 0])
        first = Pair(zero, zero)
    if method == "loop" or is_empty(w):
        return _pivots_loop(alpha, w, first)
    sweep = scan_pivots if method == "scan" else resolvent_sweep
    return Pair(*sweep(*alpha, w, *first))


def _pivots_loop(alpha: Pair, w: Tensor, first: Pair) -> Pair:
    G, pivots = first, []
    for a_re, a_im, w_i in zip(alpha.re.unbind(-1), alpha.im.unbind(-1), w.unbind(-1), strict=True):
        G = _reciprocal(Pair(a_re - w_i * G.re, a_im - w_i * G.im))
        pivots.append(G)
    return Pair(torch.stack([G.re for G in pivots], dim=-1), torch.stack([G.im for G in pivots], dim=-1))


def _reciprocal(z: Pair) -> Pair:
    square = z.re * z.re + z.im * z.im
    return Pair(z.re / square, -z.im / square)


def hermitian_couplings(c: Pair, b: Pair | None = None) -> Tensor:
    """w = b c = |c|^2 for an operator with c below the diagonal and b above it, which must be conj(c), as in a hermitian one.

    Pivots need w >= 0 alone, but the bound of :func:`~trix.functional.resolvent_mix.resolvent_mix` needs |c|^2 = w: with
    b = 1/4 and c = 4, which also give w = 1, what is mixed outgrows it without end.

    Args:
        c: float32 or float64, any shape. b: of that shape; None is conj(c).

    Raises:
        ValueError: b is not conj(c), or shapes or dtypes that differ.
    """
    if b is not None:
        for name, part in zip(("Re b", "Im b"), b, strict=True):
            check_like(name, part, "c", c.re, c.re.shape)
        is_other = (b.re != c.re) | (b.im != -c.im)
        if bool(is_other.any()):
            b_value, c_value = (complex(part.re[is_other][0], part.im[is_other][0]) for part in (b, c))
            raise ValueError(f"b ({b_value:g}) must be the conjugate of c ({c_value:g})")
    return c.re.square() + c.im.square()


def two_sided_diagonal(alpha: Pair, w: Tensor, *, method: Method = "chunk") -> Pair:
    """The diagonal of the inverse of the whole operator: G_ii = 1 / (alpha_i - w_i GL_{i-1} - w_{i+1} GR_{i+1}).

    GL are the pivots from the left (:func:`resolvent_pivots`), GR those from the right. Every entry depends on every token: it
    leaks the future, and is for encoders and analysis only. alpha [..., N] and w [..., N] as there; w_0 has no effect.

    Raises:
        ValueError: as :func:`resolvent_pivots`.
    """
    left = resolvent_pivots(alpha, w, method=method)
    right_w = w.flip(-1).roll(1, -1)  # seen from the right, the coupling of token i is that of i and i + 1
    right = resolvent_pivots(Pair(alpha.re.flip(-1), alpha.im.flip(-1)), right_w, method=method)
    w_before, w_after = w[..., 1:], w.roll(-1, -1)[..., :-1]
    pull_re = _pad_first(w_before * left.re[..., :-1]) + _pad_last(w_after * right.re.flip(-1)[..., 1:])
    pull_im = _pad_first(w_before * left.im[..., :-1]) + _pad_last(w_after * right.im.flip(-1)[..., 1:])
    return _reciprocal(Pair(alpha.re - pull_re, alpha.im - pull_im))


def _pad_first(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 0))


def _pad_last(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1))


def log_prefix_determinant(G: Pair, G0: Pair) -> Pair:
    """log D_t with D_t = prod_{i<=t} G0_i / G_i = det(H_t - z) / det(H0_t - z), H_t the leading block 0..t. Causal.

    Args:
        G, G0: pivots [..., N] of the operator and of the one it is compared with, each with Im > 0.

    Returns:
        The logarithm of |D_t| and the phase sum_{i<=t} (arg G0_i - arg G_i) [..., N]. The phase is continuous, not wrapped; the
        phase over pi tends to N(H0_t < lambda) - N(H_t < lambda) as eta goes to 0 (Birman-Krein).
    """
    log_ratio = (G0.re.square() + G0.im.square()).log() - (G.re.square() + G.im.square()).log()
    turn = torch.atan2(G0.im, G0.re) - torch.atan2(G.im, G.re)
    return Pair((0.5 * log_ratio).cumsum(-1), turn.cumsum(-1))


def open_left_end(alpha: Pair, w: Tensor) -> Pair:
    """The pivot G* of an endless row of equal tokens to the left: the root of w G^2 - alpha G + 1 = 0 with sqrt(w)|G| <= 1.

    Given as ``first``, it lets the first token see no edge. alpha with Im alpha < 0 and w >= 0, of any one shape; w = 0 gives
    1 / alpha.
    """
    # G = 1 / d, d the root of d^2 - alpha d + w = 0 of larger modulus: the two roots have the product w.
    root = _sqrt(Pair(alpha.re * alpha.re - alpha.im * alpha.im - 4.0 * w, 2.0 * alpha.re * alpha.im))
    is_opposed = alpha.re * root.re + alpha.im * root.im < 0
    sign = torch.where(is_opposed, -1.0, 1.0).to(w.dtype)
    return _reciprocal(Pair(0.5 * (alpha.re + sign * root.re), 0.5 * (alpha.im + sign * root.im)))


def _sqrt(z: Pair) -> Pair:
    modulus, is_right = (z.re * z.re + z.im * z.im).sqrt(), z.re >= 0
    # Of the two parts the one that is computed without cancellation. abs() would have no gradient at 0.
    large = (0.5 * (modulus + torch.where(is_right, z.re, -z.re))).sqrt()
    small = 0.5 * z.im / large
    return Pair(torch.where(is_right, large, small), torch.where(is_right, small, large))


def is_empty(x: Tensor) -> bool:
    """Whether there is no value, as in a batch of no text; never in a compiled or exported program."""
    return not torch.compiler.is_compiling() and x.numel() == 0


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(str, choices))}")


def check_like(name: str, x: Tensor, like_name: str, like: Tensor, shape: torch.Size) -> None:
    """x has the dtype and the device of like, and the given shape."""
    if x.shape != shape:
        raise ValueError(f"shape of {name} {tuple(x.shape)} must be {tuple(shape)}, as {like_name} {tuple(like.shape)} has it")
    if x.dtype != like.dtype:
        raise ValueError(f"dtype of {name} ({x.dtype}) must be that of {like_name} ({like.dtype})")
    if x.device != like.device:
        raise ValueError(f"device of {name} ({x.device}) must be that of {like_name} ({like.device})")


def check_floats(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype of {name} ({x.dtype}) must be torch.float32 or torch.float64")


def _check_pivots(alpha: Pair, w: Tensor | None, first: Pair | None) -> None:
    check_floats("alpha", alpha.re)
    if alpha.re.ndim == 0 or alpha.re.shape[-1] == 0:
        raise ValueError(f"alpha {tuple(alpha.re.shape)} must be [..., N] with N >= 1 tokens")
    check_like("Im alpha", alpha.im, "Re alpha", alpha.re, alpha.re.shape)
    if w is not None:
        check_like("w", w, "alpha", alpha.re, alpha.re.shape)
    for part in first or ():
        check_like("first", part, "alpha", alpha.re, alpha.re.shape[:-1])
    if torch.compiler.is_compiling() or alpha.re.numel() == 0:
        return
    _check_range("Re alpha", alpha.re)
    low, high = _check_range("Im alpha", alpha.im)
    if high >= 0:
        raise ValueError(f"eta = -Im alpha ({-high}) must be > 0")
    if w is not None and (low := _check_range("w", w)[0]) < 0:
        raise ValueError(f"w ({low}) must be >= 0")
    if first is not None:
        _check_range("Re first", first.re)
        if (low := _check_range("Im first", first.im)[0]) < 0:
            raise ValueError(f"Im first ({low}) must be >= 0")


def _check_range(name: str, x: Tensor) -> tuple[float, float]:
    low, high = (value.item() for value in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} ({high if math.isfinite(low) else low}) must be finite")
    return low, high
