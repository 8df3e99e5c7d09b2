"""What makes a run's TensorBoard pages a lab notebook: charts that belong together, hyperparameters, surgery, signatures.

Shape suffixes: E tiles, D model width, C classes, K chosen tiles.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lightning_modules.callbacks.figures import has_tensorboard, tensorboard_loggers
from lightning_modules.routed_layers import routed_layers
from trix.nn import RoutedLayer
from trix.routing import ClaimMatrix
from trix.routing.surgery import ALL_TILES

MAX_TEXT = 80  # characters of a hyperparameter; longer ones (a vocabulary, many classes) are left out
MAX_HISTORY = 200  # entries of the surgery history that are shown
EMBEDDING_COLUMNS = ("tile", "layer", "dominant_class", "purity", "usage", "frozen", "tag")
SEED_VARIABLE = "PL_GLOBAL_SEED"  # where seed_everything leaves it

Layout = dict[str, dict[str, list[Any]]]


class RunNotebook(L.Callback):
    """Write for TensorBoard what needs the run as a whole; other loggers get nothing.

    While the run goes on: a layout for the page of custom scalars (losses, diversity, routing, the usage of each layer's tiles,
    claim rates between the lowest and the highest), of the metrics that are logged; and ``surgery/history``, a table of what
    was done to which tile, whoever did it, written anew when it has grown.

    At the end, also where an error or the user ends the run: hyperparameters with the metrics of the last validation
    (``summary/last_...``) and of the best (``summary/best_...``: by the metric that the ModelCheckpoint monitors, else by
    val/loss), for the page HPARAMS; and the signatures as points for the projector, with the class that came most often to a
    tile in the last validation, how pure that was, the tile's share of the assignments, whether it is frozen, and its last tag.

    A checkpoint holds the metrics of the last and the best validation. ``trix`` adds it to every ``fit``.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._claims: dict[str, ClaimMatrix] = {}
        self._count: dict[str, Tensor] = {}  # [E, C] of the last whole validation
        self._last: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._layout: Layout = {}
        self._num_entries = 0
        self._is_running = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._reset()  # a run before has nothing to do with this one; the state of a checkpoint comes after setup

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_running = has_tensorboard(trainer)
        self._write_history(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Entries say themselves when they were made: a look now and then loses none.
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            self._write_history(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_told = self._is_running and getattr(pl_module, "reports_routing", False)
        layers = routed_layers(pl_module) if is_told else {}
        self._claims = {name: ClaimMatrix(layer.num_tiles).to(pl_module.device) for name, layer in layers.items()}

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
        for name, claims in list(self._claims.items()):
            info, label = outputs["routing"][name], outputs["label"]
            if label.is_floating_point() or label.shape not in (info["tile_idx"].shape[:1], info["tile_idx"].shape[:-1]):
                del self._claims[name]  # the labels are no classes of tokens
                continue
            claims.update(info["tile_idx"], label, weight=info["weight"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, claims in self._claims.items():
            with claims.sync_context():  # on every rank
                self._count[name] = claims.count_EC.cpu()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_running or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        monitor, mode = _monitored(trainer)
        self._last = {name: value for name, value in metrics.items() if name.startswith("val/") or name == monitor}
        if monitor in metrics and not _is_better(self._best.get(monitor), metrics[monitor], mode):
            self._best = dict(self._last)
        self._write_layout(trainer, metrics)
        self._write_history(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # a full disk must not hide what ended the run
            self._write_end(trainer, pl_module)

    def _write_layout(self, trainer: L.Trainer, names: Iterable[str]) -> None:
        layout = scalar_layout(names)
        if layout != self._layout:
            self._layout = layout
            for logger in _writers(trainer):
                logger.experiment.add_custom_scalars(layout)

    def _write_history(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_running:
            return
        history = {name: layer.get_surgery_history() for name, layer in routed_layers(pl_module).items()}
        num_entries = sum(map(len, history.values()))
        if num_entries != self._num_entries:
            self._num_entries = num_entries
            for logger in _writers(trainer):
                logger.experiment.add_text("surgery/history", history_table(history), global_step=trainer.global_step)

    def _write_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_running:
            return
        self._write_history(trainer, pl_module)
        self._is_running = False
        metrics = {f"summary/last_{_bare(name)}": value for name, value in self._last.items()}
        metrics |= {f"summary/best_{_bare(name)}": value for name, value in self._best.items()}
        layers, class_names = routed_layers(pl_module), getattr(pl_module, "class_names", None)
        for logger in _writers(trainer):
            if metrics:
                logger.log_hyperparams(hyperparameters(trainer, pl_module), metrics, step=trainer.global_step)
            for width in sorted({layer.d_model for layer in layers.values()}):
                chosen = {name: layer for name, layer in layers.items() if layer.d_model == width}
                rows = [
                    row for name, layer in chosen.items() for row in tile_rows(name, layer, self._count.get(name), class_names)
                ]
                logger.experiment.add_embedding(
                    torch.cat([layer.get_tile_signatures().float().cpu() for layer in chosen.values()]),
                    metadata=rows,
                    metadata_header=list(EMBEDDING_COLUMNS),
                    global_step=trainer.global_step,
                    tag="signatures" if len(chosen) == len(layers) else f"signatures_{width}",
                )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last), "best": dict(self._best)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self._best = dict(state_dict["last"]), dict(state_dict["best"])


def scalar_layout(names: Iterable[str]) -> Layout:
    """The charts of the page of custom scalars for the metrics that there are.

    Lines are named by patterns that fit other runs too: TensorBoard shows equal charts of several runs as one.
    """
    names = set(names)
    lines = {
        "loss": ["train/loss", "val/loss"],
        "diversity of the signatures": [r"diversity/.+"],
        "entropy of the load (1 is even)": [r"routing/[^/]+/relative_entropy"],
        "confidence": [r"routing/[^/]+/confidence"],
        "churn": [r"routing/[^/]+/churn"],
    }
    layers = sorted({name.split("/")[1] for name in names if name.startswith(("tile_usage/", "claims/"))}, key=_natural)
    lines |= {f"usage of the tiles, {layer}": [rf"tile_usage/{layer}/tile_\d+"] for layer in layers}
    charts: dict[str, list[Any]] = {
        title: ["Multiline", [f"^{pattern}$" for pattern in patterns]]
        for title, patterns in lines.items()
        if any(re.fullmatch(pattern, name) for pattern in patterns for name in names)
    }
    for layer in layers:
        rates = [f"claims/{layer}/{part}_claim_rate" for part in ("mean", "lowest", "highest")]
        if names.issuperset(rates):
            charts[f"claim rate of the classes, {layer}"] = ["Margin", rates]
    return {"TriX": charts} if charts else {}


def history_table(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: the acts of all layers, the last one first."""
    entries = [(name, entry) for name, entries in history.items() for entry in entries]
    entries.sort(key=lambda item: -item[1]["step"])
    rows = ["| training batches | layer | tile | act | tag |", "|---:|---|---:|---|---|"]
    for name, entry in entries[:MAX_HISTORY]:
        tile = "all" if entry["tile_idx"] == ALL_TILES else entry["tile_idx"]
        tag = str(entry["tag"]).replace("|", r"\|").replace("\n", " ")
        rows.append(f"| {entry['step']} | {name} | {tile} | {entry['operation']} | {tag} |")
    if len(entries) > MAX_HISTORY:
        rows += ["", f"and {len(entries) - MAX_HISTORY} earlier ones"]
    return "\n".join(rows)


def hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """What tells one run from another: the network, the optimizer, the data, the length; long values are left out."""
    datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
    values: dict[str, Any] = {
        "task": type(pl_module).__name__,
        "data": {} if datamodule is None else {"class": type(datamodule).__name__},
        "max_steps": trainer.max_steps,
        "seed": os.environ.get(SEED_VARIABLE, ""),
    }
    values["data"]["batch_size"] = getattr(datamodule, "batch_size", None)
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        values["optimizer"] = {"class": type(optimizer).__name__, "lr": group.get("initial_lr", group["lr"])}
        if "weight_decay" in group:
            values["optimizer"]["weight_decay"] = group["weight_decay"]
    return _short(values | dict(pl_module.hparams))


def tile_rows(name: str, layer: RoutedLayer, count_EC: Tensor | None, class_names: Sequence[str] | None) -> list[list[str]]:
    """A row of EMBEDDING_COLUMNS for each tile. count_EC: assignments by class; None where nothing was counted."""
    claims = ClaimMatrix(layer.num_tiles)
    if count_EC is not None:
        claims.count_EC = count_EC
    purity_E, usage_E = claims.purity(), claims.count_EC.sum(dim=1) / claims.count_EC.sum().clamp_min(1)
    is_frozen = layer.frozen_tiles().tolist()
    tags = {entry["tile_idx"]: str(entry["tag"]) for entry in layer.get_surgery_history()}
    rows = []
    for tile, class_idx in enumerate(claims.dominant_class().tolist()):
        dominant = "-" if class_idx < 0 else _class_name(class_idx, class_names)
        counted = (f"{float(purity_E[tile]):.3f}", f"{float(usage_E[tile]):.4f}")
        purity, usage = ("-", "-") if count_EC is None else counted
        frozen = "frozen" if is_frozen[tile] else "free to learn"
        row = [f"{name} tile {tile}", name, dominant, purity, usage, frozen, tags.get(tile) or "-"]
        rows.append([" ".join(cell.split()) or "-" for cell in row])  # a tab or a line break would end the cell
    return rows


def _class_name(class_idx: int, class_names: Sequence[str] | None) -> str:
    """Never a bare number, for which the projector would choose shades of one colour."""
    name = str(class_idx) if class_names is None else class_names[class_idx]
    return f"class {name}" if re.fullmatch(r"[-+]?\d[\d.]*", name) else name


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, a list, or longer than MAX_TEXT."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            short[name] = _short(value)
        elif isinstance(value, bool | int | float | str) and len(str(value)) <= MAX_TEXT:
            short[name] = value
    return short


def _monitored(trainer: L.Trainer) -> tuple[str, str]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback.monitor, callback.mode
    return "val/loss", "min"


def _is_better(value: float | None, than: float, mode: str) -> bool:
    """Whether an earlier value is at least as good; NaN never is."""
    return value is not None and (value <= than if mode == "min" else value >= than)


def _writers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return tensorboard_loggers(trainer) if trainer.is_global_zero else []


def _bare(name: str) -> str:
    return name.removeprefix("val/")


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
