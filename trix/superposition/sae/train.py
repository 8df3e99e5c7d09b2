"""Training on a stream of activations: the bare loop, and the step that every other loop shares with it."""

from collections.abc import Callable, Iterable, Iterator
from inspect import isclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from trix.superposition.sae.base import ARCHITECTURES, SAE, SAEStep
from trix.superposition.sae.standard import SparseAutoencoder

if TYPE_CHECKING:
    from trix.superposition.config import SAEConfig


def make_sae(d_model: int, config: "SAEConfig") -> SAE:
    """The autoencoder that a configuration describes.

    Raises:
        ValueError: an architecture that is not registered, and what it says of its settings.
    """
    arguments: dict[str, Any] = {}
    kind = ARCHITECTURES.get(config.architecture)
    if isclass(kind) and issubclass(kind, SAE) and kind.fixes_active:
        arguments["active"] = config.active
    if kind is SparseAutoencoder:
        arguments["l1"] = config.l1
    return ARCHITECTURES.make(config.architecture, d_model, config.k, arguments=arguments)


def train_sae(
    sae: SAE, shard_iter: Callable[[], Iterable[Tensor]], cfg: "SAEConfig", device: str | torch.device = "cpu"
) -> list[dict[str, float]]:
    """Train on cfg.epochs passes over the activations with Adam, then fold the scales into the weights.

    Args:
        shard_iter: returns a new iterator over activations, float [n, D] of any n; a pass goes through all of them, in order.
        cfg: its k must be the autoencoder's. Of a standard one, cfg.l1 replaces the penalty's weight.

    Returns:
        For each epoch the means of loss, reconstruction, sparsity, aux and active latents per token.

    Raises:
        ValueError: another k, no activations, activations of another width or that are not finite.
        TypeError: shard_iter is not callable.
    """
    if cfg.k != sae.k:
        raise ValueError(f"k of the configuration ({cfg.k}) must be that of the autoencoder ({sae.k})")
    if not callable(shard_iter):
        raise TypeError(f"shard_iter ({type(shard_iter).__name__}) must be a callable without arguments that gives batches")
    if isinstance(sae, SparseAutoencoder):
        sae.l1 = cfg.l1
    sae.to(device).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.lr)
    epochs: list[dict[str, float]] = []
    for epoch in range(cfg.epochs):
        sums, num_tokens = torch.zeros(5, dtype=torch.float64), 0
        for x_ND in track(batches(shard_iter(), cfg.batch_size), f"epoch {epoch + 1} of {cfg.epochs}"):
            x_ND = x_ND.to(device)
            if not bool(x_ND.isfinite().all()):
                raise ValueError(f"activations (batch after {num_tokens} tokens of epoch {epoch + 1}) must be finite")
            if not epochs and num_tokens == 0:
                sae.start_from(x_ND)
            step = take_step(sae, optimizer, x_ND, x_ND)
            active = step.fired_K.sum() / len(x_ND)
            sums += len(x_ND) * torch.stack([step.loss.detach(), *step[1:4], active]).double().cpu()
            num_tokens += len(x_ND)
        if num_tokens == 0:
            raise ValueError(f"number of activations in epoch {epoch + 1} (0) must be >= 1")
        names = ("loss", "reconstruction", "sparsity", "aux", "active")
        epochs.append(dict(zip(names, (sums / num_tokens).tolist(), strict=True)))
    sae.eval().fold_()
    return epochs


def take_step(sae: SAE, optimizer: torch.optim.Optimizer, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
    """One step of training on a batch."""
    step = sae.training_step(x_ND, target_NO)
    optimizer.zero_grad()
    step.loss.backward()  # type: ignore[no-untyped-call]
    sae.before_optimizer_step()
    optimizer.step()
    sae.after_optimizer_step()
    sae.note(step, len(x_ND))
    return step


def batches(parts: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """All rows of the parts in order, batch_size at a time across their borders; the last batch may be smaller."""
    held: list[Tensor] = []
    num_held = 0
    for part in parts:
        while num_held + len(part) >= batch_size:
            head, part = part[: batch_size - num_held], part[batch_size - num_held :]
            yield torch.cat([*held, head])
            held, num_held = [], 0
        if len(part):
            held.append(part)
            num_held += len(part)
    if held:
        yield torch.cat(held)
