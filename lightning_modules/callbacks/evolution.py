"""Let routed layers change their own structure while they train: merge, split and re-seed tiles, and raise k."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import check_reports_routing, routed_layers
from trix.evolution import (
    copy_tile_state,
    merge_tiles,
    raise_k,
    redundant_pairs,
    reseed_tile,
    reset_tile_state,
    split_tile,
)
from trix.nn import TriXFFN
from trix.routing import SignatureRouter

TAG = "evolution"  # of its acts in the surgery history


@dataclass(frozen=True)
class EvolutionPolicy:
    """When a layer acts on its tiles. A threshold of None turns its act off.

    Args:
        every_n_steps: training steps between two looks; what is judged is the routing since the last one.
        warmup, stop_after: no act before the one step, none after the other (None: never stop).
        cooldown: steps for which a tile that took part in an act is left alone.
        merge_above: merge tiles whose signatures have this cosine or more; the one with more tokens is kept.
        split_above: split a tile with more than this times the mean load of all slots, where a slot is free or a tile dead.
        reseed_below: a tile that gets less than this times the mean load is dead; it and the slots that merging freed go to
            splits first, and what is left of them is drawn anew.
        raise_k_below: one more tile per token where the mean confidence is below it (unit: the scores'), up to ``max_k``.

    Raises:
        ValueError: a number out of its range.
    """

    every_n_steps: int = 100
    warmup: int = 100
    stop_after: int | None = None
    cooldown: int = 200
    merge_above: float | None = 0.95
    split_above: float | None = 2.0
    reseed_below: float | None = 0.02
    raise_k_below: float | None = None
    max_k: int = 2

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or self.max_k < 1:
            raise ValueError(f"every_n_steps ({self.every_n_steps}) and max_k ({self.max_k}) must be >= 1")
        if self.warmup < 0 or self.cooldown < 0:
            raise ValueError(f"warmup ({self.warmup}) and cooldown ({self.cooldown}) must be >= 0")
        if self.stop_after is not None and self.stop_after < self.warmup:
            raise ValueError(f"stop_after ({self.stop_after}) must be >= warmup ({self.warmup})")
        if self.merge_above is not None and not 0.0 < self.merge_above <= 1.0:
            raise ValueError(f"merge_above ({self.merge_above}) must be > 0 and <= 1")
        if self.split_above is not None and not self.split_above > 1.0:
            raise ValueError(f"split_above ({self.split_above}) must be > 1")
        if self.reseed_below is not None and not 0.0 < self.reseed_below < 1.0:
            raise ValueError(f"reseed_below ({self.reseed_below}) must be > 0 and < 1")
        if self.raise_k_below is not None and not self.raise_k_below > 0.0:
            raise ValueError(f"raise_k_below ({self.raise_k_below}) must be > 0")


class Evolution(L.Callback):
    """Look at each layer every few steps and do to its tiles what the policy says (:mod:`trix.evolution`).

    The optimizer's memory of the tiles goes along: reset for a tile drawn anew, copied in a split. Each act stands in the
    layer's surgery history under the tag "evolution", as a line of the run's output and as text in TensorBoard. Logged for each
    layer at each look: ``evolution/<layer>/`` acts (at this look), tiles_in_use, top_k.

    Layers without signatures and frozen tiles are left alone; so are merging and splitting where a token has several tiles.
    Loads and confidence are summed over ranks and what is random is drawn from the step, so that under ddp all ranks do the
    same. Sharded parameters (fsdp) are not for it. A resumed run goes on with the same counts.

    Args:
        policy: when to do what.

    Raises:
        UserError: as the run starts, where no layer is routed by signatures.

    Example::

        trainer:
          callbacks+:
          - class_path: Evolution
            init_args:
              policy: {every_n_steps: 50, stop_after: 400}
    """

    def __init__(self, policy: EvolutionPolicy = EvolutionPolicy()) -> None:
        self.policy = policy
        self._reset()

    def _reset(self) -> None:
        self._statistics: dict[str, RoutingStatistics] = {}
        self._last_act: dict[str, list[int | None]] = {}  # by tile, the step
        self._last_step = -1
        self._restored: dict[str, dict[str, torch.Tensor]] = {}

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless the task returns its routing and a layer is routed by signatures."""
        check_reports_routing(network, "Evolution")
        if not _evolving_layers(network):
            raise UserError("Evolution needs a layer routed by signatures: routing 'explicit' or 'emergent'")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_network(pl_module)
        self._reset()  # a run before has nothing to do with this one; the state of a checkpoint comes after setup

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, layer in _evolving_layers(pl_module).items():
            statistics = RoutingStatistics(layer.num_tiles)
            if trainer.is_global_zero:  # they are those of all ranks
                for key, value in self._restored.get(name, {}).items():
                    setattr(statistics, key, value.clone())
            self._statistics[name] = statistics.to(pl_module.device)
            self._last_act.setdefault(name, [None] * layer.num_tiles)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, policy = trainer.global_step, self.policy
        if policy.stop_after is not None and step > policy.stop_after:
            return
        if outputs:  # nothing comes of a batch that has been left out
            for name, statistics in self._statistics.items():
                info = outputs["routing"][name]
                statistics.update(info["tile_idx"], info["weight"], info["scores"])
        # With gradients accumulated, several batches belong to one step.
        if step % policy.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        for index, (name, layer) in enumerate(_evolving_layers(pl_module).items()):
            result = self._statistics[name].compute()  # on every rank: it synchronises
            self._statistics[name].reset()
            if step >= policy.warmup:
                # fork_rng: what is drawn must neither differ between ranks nor move the generator that the run uses.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(1000 * step + index)  # torch.manual_seed: also a GPU's
                    acts = self._look(name, layer, result["usage"].tolist(), float(result["confidence"]), trainer, step)
                _report(trainer, name, layer, acts)

    def _look(
        self, name: str, layer: TriXFFN, usage: list[float], confidence: float, trainer: L.Trainer, step: int
    ) -> list[str]:
        last = self._last_act[name]
        is_settled = [before is None or step - before >= self.policy.cooldown for before in last]
        look = _Look(layer, self.policy, usage, is_settled, trainer.optimizers)
        look.act(confidence)
        for tile_idx in look.touched:
            last[tile_idx] = step
        return look.acts

    @override
    def state_dict(self) -> dict[str, Any]:
        statistics = {}
        for name, metric in self._statistics.items():
            with metric.sync_context():  # on every rank, as Lightning asks each for its state
                values = {key: value.clone() for key, value in metric.metric_state.items() if isinstance(value, torch.Tensor)}
            statistics[name] = values
        last_act = {name: list(steps) for name, steps in self._last_act.items()}
        return {"statistics": statistics, "last_act": last_act, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["statistics"]
        self._last_act = {name: list(steps) for name, steps in state_dict["last_act"].items()}
        self._last_step = state_dict["last_step"]


class _Look:
    """One look at one layer: what was done (``acts``) and to which tiles (``touched``)."""

    def __init__(
        self,
        layer: TriXFFN,
        policy: EvolutionPolicy,
        usage: list[float],
        is_settled: list[bool],
        optimizers: list[Optimizer],
    ) -> None:
        assert isinstance(layer.router, SignatureRouter)
        self.layer, self.router, self.policy, self.optimizers = layer, layer.router, policy, optimizers
        self.load = [share * layer.num_tiles for share in usage]  # in units of the mean over all slots
        self.is_settled = [settled and not layer.is_frozen(tile) for tile, settled in enumerate(is_settled)]
        self.acts: list[str] = []
        self.touched: set[int] = set()

    def act(self, confidence: float) -> None:
        if self.router.top_k == 1:
            self._merge()
        slots = self._open_slots()
        if self.router.top_k == 1:
            slots = self._split(slots)
        if self.policy.reseed_below is not None:
            for tile_idx in slots:
                self._reseed(tile_idx)
        limit = min(self.policy.max_k, self.router.k_limit)
        if self.policy.raise_k_below is not None and confidence < self.policy.raise_k_below and self.router.top_k < limit:
            raise_k(self.layer, TAG)
            self.acts.append(f"k raised to {self.router.top_k}: confidence {confidence:.3f} < {self.policy.raise_k_below}")

    def _merge(self) -> None:
        if self.policy.merge_above is None:
            return
        for pair in redundant_pairs(self.layer, self.policy.merge_above):
            # A frozen tile can be kept, not dropped; the same load keeps the lower index.
            keep_idx, drop_idx = sorted(pair, key=lambda tile: (not self.layer.is_frozen(tile), -self.load[tile], tile))
            is_ready = all(self.is_settled[tile] or self.layer.is_frozen(tile) for tile in pair)
            if not is_ready or self.layer.is_frozen(drop_idx) or any(self.router.is_free_E[tile] for tile in pair):
                continue
            merge_tiles(self.layer, keep_idx, drop_idx, TAG)
            for optimizer in self.optimizers:
                reset_tile_state(optimizer, self.layer, drop_idx)
            self.load[keep_idx] += self.load[drop_idx]
            self.load[drop_idx] = 0.0
            self.touched |= {keep_idx, drop_idx}
            self.acts.append(f"tile {drop_idx} merged into {keep_idx}")

    def _open_slots(self) -> list[int]:
        """Free slots, then dead tiles."""
        is_free = self.router.is_free_E.tolist()
        free = [tile for tile, free in enumerate(is_free) if free and not self.layer.is_frozen(tile)]
        lowest = self.policy.reseed_below
        dead = [t for t, load in enumerate(self.load) if lowest is not None and load < lowest and self.is_settled[t]]
        return free + [tile for tile in dead if tile not in free]

    def _split(self, slots: list[int]) -> list[int]:
        """Split overloaded tiles, the most loaded first, into slots; returns those that are left."""
        slots = list(slots)
        for source_idx in sorted(range(len(self.load)), key=lambda tile: -self.load[tile]):
            is_ready = self.is_settled[source_idx] and source_idx not in self.touched
            if not slots or self.policy.split_above is None or self.load[source_idx] <= self.policy.split_above:
                break
            if not is_ready:
                continue
            target_idx = slots.pop(0)
            split_tile(self.layer, source_idx, target_idx, TAG)
            for optimizer in self.optimizers:
                copy_tile_state(optimizer, self.layer, source_idx, target_idx)
            self.touched |= {source_idx, target_idx}
            self.acts.append(f"tile {source_idx} (load {self.load[source_idx]:.1f} of the mean) split into {target_idx}")
        return slots

    def _reseed(self, tile_idx: int) -> None:
        reseed_tile(self.layer, tile_idx, TAG)
        for optimizer in self.optimizers:
            reset_tile_state(optimizer, self.layer, tile_idx)
        self.touched.add(tile_idx)
        self.acts.append(f"tile {tile_idx} re-seeded")


def _evolving_layers(network: nn.Module) -> dict[str, TriXFFN]:
    return {
        name: layer
        for name, layer in routed_layers(network).items()
        if isinstance(layer, TriXFFN) and isinstance(layer.router, SignatureRouter)
    }


def _report(trainer: L.Trainer, name: str, layer: TriXFFN, acts: list[str]) -> None:
    assert isinstance(layer.router, SignatureRouter)
    step = trainer.global_step
    metrics = {
        f"evolution/{name}/acts": float(len(acts)),
        f"evolution/{name}/tiles_in_use": float((~layer.router.is_free_E).sum()),
        f"evolution/{name}/top_k": float(layer.router.top_k),
    }
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
        if acts and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(f"evolution/{name}", "; ".join(acts), global_step=step)
    for act in acts:
        rank_zero_info(f"Evolution at step {step}: {name}: {act}")
