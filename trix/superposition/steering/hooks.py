"""Steering: a forward pre-hook on a block that changes what some latents say in the residual stream.

Shapes: B texts, T tokens, D width, K latents, K' merged latents.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trix.superposition.backends.base_model import replace_stream

LatentMap = Callable[[Tensor], Tensor]  # z [..., K] -> the z that is wanted, [..., K]
Positions = Literal["last", "all"]
_MASK = ("attention_mask", "mask_BT")  # what models call their mask of real tokens


class SteerableSAE(Protocol):
    """What steering needs of an autoencoder: an :class:`~trix.superposition.sae.SAE`, or a merged one."""

    k: int
    W_dec: Any

    def encode(self, x_ND: Tensor, /) -> Tensor: ...


class SteerableBackend(Protocol):
    """What steering needs of a backend: its model, and its blocks."""

    @property
    def model(self) -> nn.Module: ...

    def block(self, layer: int) -> nn.Module: ...


class LatentModifier:
    """Set latents to a value, or scale them, and leave all others as they are.

    Args:
        indices: the latents. set_to, scale_by: exactly one of them: the new value, or a factor.

    Raises:
        ValueError: no latent, one that is no int, negative or repeated; both of set_to and scale_by or neither, or one that is
            not finite; when it is called, a latent >= K.
    """

    def __init__(self, indices: Sequence[int], set_to: float | None = None, scale_by: float | None = None) -> None:
        if not all(isinstance(index, Integral) for index in indices):
            raise ValueError(f"latents to modify ({list(indices)}) must be ints")
        if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(f"latents to modify ({list(indices)}) must be different numbers >= 0, and at least one")
        if (set_to is None) == (scale_by is None):
            raise ValueError(f"exactly one of set_to ({set_to}) and scale_by ({scale_by}) must be given")
        for name, value in {"set_to": set_to, "scale_by": scale_by}.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} ({value}) must be finite")
        self.indices, self.set_to, self.scale_by = [int(index) for index in indices], set_to, scale_by

    def __call__(self, z: Tensor) -> Tensor:
        if max(self.indices) >= z.shape[-1]:
            raise ValueError(f"latent to modify ({max(self.indices)}) must be < number of latents ({z.shape[-1]})")
        z = z.clone()
        if self.set_to is not None:
            z[..., self.indices] = self.set_to
        if self.scale_by is not None:
            z[..., self.indices] *= self.scale_by
        return z


def set_or_scale_latent(
    j: int | None = None, set_to: float | None = None, scale_by: float | None = None, *, latent_j: int | None = None
) -> LatentModifier:
    """Set one latent to a value, or scale it; ``latent_j`` is another name of ``j``.

    Raises:
        ValueError: both names or neither, and as :class:`LatentModifier`.
    """
    if (j is None) == (latent_j is None):
        raise ValueError(f"exactly one of j ({j}) and latent_j ({latent_j}) must be given")
    return LatentModifier([latent_j if j is None else j], set_to, scale_by)  # type: ignore[list-item]


def multi_latent_modifier(
    latent_indices: Sequence[int], set_to: float | None = None, scale_by: float | None = None
) -> LatentModifier:
    """Set several latents to one value, or scale them by one factor; errors as :class:`LatentModifier`."""
    return LatentModifier(latent_indices, set_to, scale_by)


def merge_wrapper(enc: Callable[[Tensor], Tensor], M: Tensor) -> Callable[[Tensor], Tensor]:
    """An encoder of merged latents, x -> enc(x) M, with M [K, K'] from ``merge.medoid.merge_matrix_from_labels``."""

    def encode(x: Tensor) -> Tensor:
        z = enc(x)
        if z.shape[-1] != len(M):
            raise ValueError(f"rows of M ({len(M)}) must be the number of latents ({z.shape[-1]})")
        return z @ M.to(z)

    return encode


class SteeringHandle:
    """The hooks of one steering; ``remove`` takes all of them away, and may be called again."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def register_prehook_last_row(
    backend: SteerableBackend, layer_idx: int, sae: SteerableSAE, latent_map: LatentMap
) -> SteeringHandle:
    """Steer the last real token of each text before block ``layer_idx``, and in generation every new token.

    The caller removes the handle; :func:`steering` does so by itself. Errors as there.
    """
    return _register(backend, layer_idx, sae, latent_map, "last")


@contextmanager
def steering(
    backend: SteerableBackend, layer_idx: int, sae: SteerableSAE, latent_map: LatentMap, positions: Positions = "last"
) -> Iterator[None]:
    """Steer within the block: x becomes x + (z' - z) W_dec, with z = sae.encode(x) and z' = latent_map(z).

    It is computed in float32 and only where z' differs from z, so that a map which changes nothing leaves the model's output
    as it was, to the bit. The hooks are removed whatever happens.

    Args:
        positions: ``last``, the last real token of each text and every token that is generated; or ``all`` real tokens. Which
            tokens are real is read from the mask that the model is called with; without one all are.

    Raises:
        ValueError: no such layer, a map that refuses z or changes its shape, another value of positions; in a forward, a
            stream of another width than the autoencoder's.
    """
    handle = _register(backend, layer_idx, sae, latent_map, positions)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def steered(x_ND: Tensor, sae: SteerableSAE, latent_map: LatentMap) -> Tensor:
    """x + (z' - z) W_dec, float [N, D] in the type of x; x itself where nothing changes."""
    z_NK = sae.encode(x_ND)
    change_NK = latent_map(z_NK.clone()) - z_NK
    changed_N = (change_NK != 0).any(dim=-1)
    if not bool(changed_N.any()):
        return x_ND
    weight_KD = sae.W_dec.float() / getattr(sae, "output_scale", 1.0)  # a merged one has no scales
    out_ND = x_ND.clone()
    out_ND[changed_N] = (x_ND[changed_N].float() + change_NK[changed_N] @ weight_KD).to(x_ND.dtype)
    return out_ND


def _register(
    backend: SteerableBackend, layer_idx: int, sae: SteerableSAE, latent_map: LatentMap, positions: Positions
) -> SteeringHandle:
    if positions not in ("last", "all"):
        raise ValueError(f"positions ({positions!r}) must be 'last' or 'all'")
    probe = latent_map(torch.zeros(1, sae.k, device=sae.W_dec.device))
    if probe.shape != (1, sae.k):
        raise ValueError(f"latents of the map (shape {list(probe.shape)}) must be those it got (shape {[1, sae.k]})")
    block = backend.block(layer_idx)
    mask: list[Tensor | None] = [None]
    names = list(inspect.signature(backend.model.forward).parameters)

    def note_mask(_: nn.Module, unnamed: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(names, unnamed, strict=False)), **named}
        mask[0] = next((given[name] for name in _MASK if given.get(name) is not None), None)

    def steer(x_BTD: Tensor) -> Tensor:
        is_steered_BT = _chosen(x_BTD, mask[0], positions)
        part_ND = x_BTD[is_steered_BT]
        new_ND = steered(part_ND, sae, latent_map)
        if new_ND is part_ND:
            return x_BTD
        new_BTD = x_BTD.clone()
        new_BTD[is_steered_BT] = new_ND
        return new_BTD

    noting = backend.model.register_forward_pre_hook(note_mask, with_kwargs=True)
    return SteeringHandle([noting, replace_stream(block, steer)])


def _chosen(x_BTD: Tensor, mask: Tensor | None, positions: Positions) -> Tensor:
    """bool [B, T]: the tokens to steer. A mask may cover tokens before x, too; its end is that of x."""
    num_texts, num_tokens = x_BTD.shape[:2]
    is_real_BT = torch.ones(num_texts, num_tokens, dtype=torch.bool, device=x_BTD.device)
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= num_tokens:
        is_real_BT = mask[:, -num_tokens:].bool().to(x_BTD.device)
    if positions == "all":
        return is_real_BT
    after_BT = is_real_BT.flip(-1).cumsum(dim=-1).flip(-1)  # real tokens from here on
    return is_real_BT & (after_BT == 1)
