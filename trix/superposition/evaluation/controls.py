"""Autoencoders that are trained to be compared: controls whose weights stay random in part, and other seeds.

Shapes: N tokens, D width of what is read, O width of what is written.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trix.superposition.sae import SAE
from trix.superposition.sae.train import take_step

Batch = tuple[Tensor, Tensor]


def new_sae(make: Callable[[], SAE], seed: int, restraint: str | None = None) -> SAE:
    """A new autoencoder, whose random weights are drawn with the seed; the global random state stays as it is.

    Args:
        make: makes the autoencoder. restraint: makes it a control, see :meth:`trix.superposition.sae.SAE.restrain`.

    Raises:
        ValueError: an unknown restraint, or what ``make`` says of its settings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = make()
    return sae if restraint is None else sae.restrain(restraint)


def train_steps(
    sae: SAE,
    batches: Iterable[Batch],
    num_steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    device: torch.device | str = "cpu",
    track: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> SAE:
    """Train a new autoencoder for a number of steps, exactly as :class:`lightning_modules.tasks.SparseAutoencoderTask` does.

    Args:
        sae: on the device already, as the optimizer holds its parameters. batches: at least num_steps pairs (x_ND, target_NO),
            float; the target is x itself, except for a transcoder. scheduler: stepped after every step.
        track: wraps the batches to show progress.

    Returns:
        The same autoencoder in evaluation mode, with the scales in its weights.

    Raises:
        ValueError: num_steps < 1, fewer batches, an autoencoder that was trained before, or a loss that is not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps ({num_steps}) must be >= 1")
    sae.train()
    done, loss = 0, torch.zeros(())
    for x_ND, target_NO in track(islice(batches, num_steps)):
        x_ND, target_NO = x_ND.to(device), target_NO.to(device)
        if done == 0:
            sae.start_from(x_ND, target_NO)
        loss = take_step(sae, optimizer, x_ND, target_NO).loss.detach()
        if scheduler is not None:
            scheduler.step()
        done += 1
    if done < num_steps:
        raise ValueError(f"number of batches ({done}) must be >= num_steps ({num_steps})")
    if not bool(loss.isfinite()):
        raise ValueError(f"loss of the last step ({float(loss)}) must be finite: the learning rate may be too high")
    return sae.eval().fold_()
