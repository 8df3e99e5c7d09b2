"""Watch the operators of resolvent mixers: their phases, how near they come to their bound, and their spectral shift."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_modules.callbacks.figures import tensorboard_loggers
from lightning_modules.errors import UserError
from trix.functional.resolvent import Pair, log_prefix_determinant, open_left_end
from trix.nn import ResolventMixer


class ResolventMonitor(L.Callback):
    """After each validation: what the resolvent mixers do with its first batch.

    Scalars, for each mixer: ``resolvent/<layer>/`` g_eta, the largest |G| eta of any token and head, at most 1 [theorem];
    eta, the mean; spectral_shift, the mean over texts and heads of |xi| at the last token, xi = 1/pi sum_i (arg G*_i - arg G_i)
    with the pivots G* of the head's mean entries: Krein's shift where eta and c do not vary. TensorBoard also gets the
    histogram ``resolvent/<layer>/phase``, radians from 0 to pi, which routing by phase reads. The load of the tiles is
    RoutingMonitor's.

    Args:
        bins: number of bins of the histogram.

    Raises:
        ValueError: bins < 1. UserError: as the run starts, where the network has no resolvent mixer.

    Example::

        trainer:
          callbacks+:
          - class_path: ResolventMonitor
            init_args: {bins: 32}
    """

    def __init__(self, bins: int = 64) -> None:
        if bins < 1:
            raise ValueError(f"bins ({bins}) must be >= 1")
        self.bins = bins
        self._inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._hooks: list[RemovableHandle] = []

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError where it has no resolvent mixer."""
        if not _mixers(network):
            raise UserError("ResolventMonitor needs a network with a resolvent mixer (mixer: resolvent), this one has none")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.check_network(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or dataloader_idx:
            return
        for name, mixer in _mixers(pl_module).items():
            self._hooks.append(mixer.register_forward_pre_hook(self._keeper(name)))

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._inputs[name] = inputs[0].detach(), inputs[1].mask_BT

        return keep

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        inputs, self._inputs = self._inputs, {}
        if trainer.sanity_checking:
            return
        for index, (name, mixer) in enumerate(_mixers(pl_module).items()):
            if name not in inputs:
                continue
            metrics, phase = _read(mixer, *inputs[name])
            pl_module.log_dict({f"resolvent/layer_{index}/{key}": value for key, value in metrics.items()}, sync_dist=True)
            for logger in tensorboard_loggers(trainer):
                tag = f"resolvent/layer_{index}/phase"
                logger.experiment.add_histogram(tag, phase, global_step=trainer.global_step, bins=self.bins)


@torch.no_grad()
def _read(mixer: ResolventMixer, x_BTD: Tensor, mask_BT: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    hops = mixer.read_hops(x_BTD, mask_BT)
    is_token_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device) if mask_BT is None else mask_BT
    eta_BHT = hops.scale_in.square()
    g_eta_BHT = (hops.G.re.square() + hops.G.im.square()).sqrt() * eta_BHT
    alpha, _, hop_H = mixer.mean_operator(eta_BHT.dtype)
    w_H = hop_H.square() if mixer.hopping == "hermitian" else torch.zeros_like(hop_H)
    end = Pair(*(part[:, None].expand_as(eta_BHT) for part in open_left_end(alpha, w_H)))
    shift_BH = log_prefix_determinant(hops.G, end).im[..., -1] / math.pi  # padding has the pivot of the end: no shift
    phase_BT = mixer.phase(hops)
    metrics = {
        "g_eta": (g_eta_BHT * is_token_BT[:, None]).max(),
        "eta": (eta_BHT * is_token_BT[:, None]).sum() / is_token_BT.sum() / eta_BHT.shape[1],
        "spectral_shift": shift_BH.abs().mean(),
    }
    return metrics, phase_BT[is_token_BT]


def _mixers(network: nn.Module) -> dict[str, ResolventMixer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ResolventMixer)}
