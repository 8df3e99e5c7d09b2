"""What ``trix upcycle`` says of a model that it has cut: its loss on held-out text beside those of controls."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from trix.nn import LanguageModel, TriXFFN
from trix.upcycling import Upcycled, best_choice, check_upcycling, cut, held_out_loss, prune, upcycle


@dataclass(frozen=True)
class UpcyclingReport:
    """Mean nats per held-out token.

    Args:
        num_neurons: of a layer. was_dense: its weights were floats.
        all_tiles: loss with every tile chosen. With top_k = num_tiles the others are None, as they would equal it.
        random_groups: neurons grouped at random.
        pruned_by_activity, pruned_by_magnitude: as many neurons as the chosen tiles have, the same for all tokens.
        best_choice: with the tiles that the output needs most.
    """

    num_layers: int
    num_neurons: int
    num_tiles: int
    top_k: int
    was_dense: bool
    text_tokens: int
    held_out_tokens: int
    original: float
    all_tiles: float
    upcycled: float | None = None
    random_groups: float | None = None
    pruned_by_activity: float | None = None
    pruned_by_magnitude: float | None = None
    best_choice: float | None = None

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size, some = self.num_neurons // self.num_tiles, f"{self.top_k} of {self.num_tiles} tiles"
        width = size * self.top_k
        same = "their codes, made of float weights" if self.was_dense else "the same function"
        losses = {
            "the original": self.original,
            f"all {self.num_tiles} tiles, {same}": self.all_tiles,
            f"{some}, grouped by co-activation: this is written": self.upcycled,
            f"{some}, grouped by co-activation, best choice (computes all to find it)": self.best_choice,
            f"{some}, grouped at random": self.random_groups,
            f"the {width} most active neurons of each layer, for all tokens": self.pruned_by_activity,
            f"the {width} neurons of the largest norms, for all tokens": self.pruned_by_magnitude,
        }
        lines = [
            f"cut     {self.num_layers} layers of {self.num_neurons} neurons into {self.num_tiles} tiles of {size}, of which a "
            f"token goes to {self.top_k}",
            f"text    {self.text_tokens} tokens of the training text to group and fit; held out: {self.held_out_tokens} tokens",
            *(f"loss    {loss:.4f}  {name}" for name, loss in losses.items() if loss is not None),
        ]
        controls = (self.random_groups, self.pruned_by_activity, self.pruned_by_magnitude)
        best = min((loss for loss in controls if loss is not None), default=None)
        if best is not None and self.upcycled is not None and self.upcycled >= best:
            lines.append("note    a control does as well: the groups or their signatures bring nothing here")
        return "\n".join(lines)


def measure_upcycling(
    original: LanguageModel, upcycled: Upcycled, text_BT: Tensor, held_out_BT: Tensor, target_BT: Tensor, seed: int
) -> UpcyclingReport:
    """Measure an upcycled model, and the controls, which are made of the same text.

    Args:
        seed: what it was made with.
    """
    config = upcycled.network.config.ffn
    num_tiles, top_k = config.num_tiles, config.top_k
    layers = check_upcycling(original, num_tiles, top_k)
    num_neurons = len(layers[0].up_FD)
    width = num_neurons // num_tiles * top_k

    def loss(network: LanguageModel) -> float:
        return held_out_loss(network, held_out_BT, target_BT)

    def of_best_choice() -> float:
        with best_choice(upcycled.network, layers, upcycled.groups):
            return loss(upcycled.network)

    measures: dict[str, Callable[[], float]] = {
        "original": lambda: loss(original),
        "all_tiles": lambda: loss(cut(original, upcycled.groups, num_tiles)),
    }
    if top_k < num_tiles:
        measures |= {
            "upcycled": lambda: loss(upcycled.network),
            "random_groups": lambda: loss(upcycle(original, text_BT, num_tiles, top_k, grouping="random", seed=seed).network),
            "pruned_by_activity": lambda: loss(prune(original, text_BT, width, "activity")),
            "pruned_by_magnitude": lambda: loss(prune(original, text_BT, width, "magnitude")),
            "best_choice": of_best_choice,
        }
    console = Console(stderr=True)
    shown = track(measures.items(), "measuring", console=console, transient=True, disable=not console.is_terminal)
    losses = {name: measure() for name, measure in shown}
    return UpcyclingReport(
        num_layers=len(layers),
        num_neurons=num_neurons,
        num_tiles=num_tiles,
        top_k=top_k,
        was_dense=not isinstance(original.stack.blocks[0].ffn, TriXFFN),
        text_tokens=text_BT.numel(),
        held_out_tokens=held_out_BT.numel(),
        **losses,
    )
