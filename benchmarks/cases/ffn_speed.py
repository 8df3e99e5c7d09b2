"""Time and memory of the routed layers by number of tiles, beside a loop over tiles, a mixture of experts and a dense layer.

loop      SparseLookupFFNv2 written as a Python loop over tiles with masks; with its parameters, and the same output
v1, v2    SparseLookupFFN, SparseLookupFFNv2
trix      TriXFFN, explicit signatures, one tile per token, tiles of a quarter of the width
mixture   the same tiles with float weights and GELU behind a learned gate, as grouped matrix products
dense     D -> 4 D -> D with GELU

All with LayerNorm, dropout 0.1 and residual, float32, one thread, CPU time of that thread (wall time beside it). The layers
take turns in an order that moves on with every round, each run once unmeasured right before; ratios are taken round by round.
train is forward and backward in training mode, eval is forward without gradient. Beside the layers of each size: product, the
three products behind the scores (forward and backward) alone; and routing, the choice and the balance loss alone.
saved is what the forward pass keeps for the backward pass, without parameters and input.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import one_thread

from trix import TriXFFN
from trix.functional.tile_matmul import group_tokens, grouped_linear
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.nn.sparse_lookup_v2 import SparseLookupFFNv2
from trix.routing.balance import balance_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DROPOUT = 0.1
MAX_WEIGHTS = 20_000_000  # of a layer with matrices: larger ones are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = ["128x16", "128x64", "128x256", "128x1024", "512x64", "512x256"]
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="WIDTHxTILES", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: %(default)s)")


def run(sizes: list[str], batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
    with one_thread():
        return measure(
            [(int(width), int(tiles)) for width, tiles in (size.split("x") for size in sizes)], batch, length, repeats
        )


class LoopTile(nn.Module):
    def __init__(self, layer: SparseLookupFFNv2, tile_idx: int) -> None:
        super().__init__()
        magnitude, (_, grid_size) = layer.magnitude, layer.magnitude.offset_EG.shape
        self.first, self.second = nn.Linear(2, grid_size), nn.Linear(grid_size, 1)
        self.direction = nn.Parameter(layer.direction_ED[tile_idx].clone())
        self.signature = nn.Parameter(layer.router.raw_signatures[tile_idx].clone())
        with torch.no_grad():
            self.first.weight.copy_(magnitude.slope_EGI[tile_idx])
            self.first.bias.copy_(magnitude.offset_EG[tile_idx])
            self.second.weight.copy_(magnitude.height_EG[tile_idx : tile_idx + 1])
            self.second.bias.copy_(magnitude.base_E[tile_idx : tile_idx + 1])

    def forward(self, point_T2: Tensor) -> Tensor:
        return self.second(F.relu(self.first(point_T2))) * self.direction


class LoopLookup(nn.Module):
    """SparseLookupFFNv2 as a loop over tiles, each a module that computes the tokens of its mask."""

    def __init__(self, layer: SparseLookupFFNv2) -> None:
        super().__init__()
        self.norm, self.compress, self.calibration = layer.norm, layer.compress, layer.calibration
        self.output_scale, self.dropout = layer.output_scale, nn.Dropout(layer.dropout.p)
        self.tiles = nn.ModuleList(LoopTile(layer, tile_idx) for tile_idx in range(layer.num_tiles))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        raw = torch.stack([tile.signature for tile in self.tiles])
        ternary = raw.detach().sign() * (raw.detach().abs() > 0.3)
        signatures = raw + (ternary - raw).detach()
        score = h @ signatures.T / (ternary != 0).sum(dim=1).clamp_min(1).sqrt()
        tile_idx = score.argmax(dim=-1)
        gate = self.calibration(score.amax(dim=-1))
        point = self.compress(h)
        update = torch.zeros_like(x)
        for idx, tile in enumerate(self.tiles):
            is_mine = tile_idx == idx
            if is_mine.any():
                update[is_mine] = gate[is_mine].unsqueeze(-1) * tile(point[is_mine])
        return x + self.dropout(update * self.output_scale), self.losses(raw, score, tile_idx)

    def losses(self, raw: Tensor, score: Tensor, tile_idx: Tensor) -> Tensor:
        if not self.training:
            return score.new_zeros(())
        num_tiles = len(raw)
        load = F.one_hot(tile_idx.flatten(), num_tiles).float().mean(dim=0)
        balance = num_tiles * (load * score.softmax(dim=-1).flatten(0, -2).mean(dim=0)).sum()
        ternary = torch.minimum(raw.abs(), (raw.abs() - 1.0).abs()).mean()
        active = (1.09 * raw.square() / (raw.square() + 0.09)).mean(dim=1)
        unit = F.normalize(raw, dim=1)
        diversity = F.relu(unit @ unit.T - 0.5).triu(1).sum() / max(num_tiles * (num_tiles - 1) // 2, 1)
        return 0.01 * (balance + ternary + F.relu(active - 0.3).mean() + diversity)


class FloatMixture(nn.Module):
    """One of E float experts for each token, by a learned gate; experts as grouped products of sorted tokens."""

    def __init__(self, d_model: int, num_tiles: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_tiles, bias=False)
        self.up = nn.Parameter(torch.randn(num_tiles, width, d_model) / d_model**0.5)
        self.down = nn.Parameter(torch.randn(num_tiles, d_model, width) / width**0.5)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        score_TE = self.gate(x_TD)
        tile_idx_T1 = score_TE.argmax(dim=-1, keepdim=True)
        groups = group_tokens(tile_idx_T1.squeeze(-1), len(self.up))
        hidden = F.gelu(grouped_linear(x_TD[groups.order], self.up, groups.ends))
        y_TD = grouped_linear(hidden, self.down, groups.ends)[groups.inverse]
        aux = 0.01 * balance_loss(score_TE, tile_idx_T1) if self.training else score_TE.new_zeros(())
        return y_TD * score_TE.softmax(dim=-1).gather(-1, tile_idx_T1), aux


class Residual(nn.Module):
    """x + dropout(f(LayerNorm(x))), and what f adds to the loss."""

    def __init__(self, d_model: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.dropout = nn.LayerNorm(d_model), inner, nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h_TD = self.norm(x).flatten(0, -2)
        if isinstance(self.inner, TriXFFN):
            y, _, losses = self.inner(h_TD, return_routing=True)
            aux = losses["total_aux"]
        else:
            y, aux = self.inner(h_TD) if isinstance(self.inner, FloatMixture) else (self.inner(h_TD), x.new_zeros(()))
        return x + self.dropout(y).reshape(x.shape), aux


class Lookup(nn.Module):
    def __init__(self, layer: SparseLookupFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _, losses = self.layer(x)
        return y, losses["total_aux"]


def layers(width: int, num_tiles: int) -> dict[str, nn.Module]:
    torch.manual_seed(num_tiles)
    v2 = SparseLookupFFNv2(width, num_tiles, dropout=DROPOUT)
    made: dict[str, nn.Module] = {
        "loop": LoopLookup(v2),
        "v1": Lookup(SparseLookupFFN(width, num_tiles, dropout=DROPOUT)),
        "v2": Lookup(v2),
    }
    check_loop(made["loop"], made["v2"], torch.randn(2, 64, width))
    tile_width = width // 4
    if 2 * width * tile_width * num_tiles <= MAX_WEIGHTS:
        made["trix"] = Residual(width, TriXFFN(width, num_tiles, num_tiles * tile_width, routing="explicit"))
        made["mixture"] = Residual(width, FloatMixture(width, num_tiles, tile_width))
    return made


def dense(width: int) -> nn.Module:
    return Residual(width, nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)))


@torch.no_grad()
def check_loop(loop: nn.Module, layer: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(loop.eval()(x)[0], layer.eval()(x)[0], rtol=1e-4, atol=1e-4)


def measure(sizes: list[tuple[int, int]], batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    ways: list[dict[str, Callable[[], None]]] = []

    def add(width: int, num_tiles: int | None, name: str, layer: nn.Module) -> None:
        x = torch.randn(batch, length, width, requires_grad=True)
        grad = torch.randn_like(x)
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
        memory = {"parameter_bytes": num_bytes, "saved_bytes": saved_bytes(layer.train(), x)}
        results.append({"width": width, "tiles": num_tiles, "layer": name, **memory})
        ways.append({"train": partial(train, layer, x, grad), "eval": partial(evaluate, layer, x)})

    def add_part(width: int, num_tiles: int, name: str, way: Callable[[], None]) -> None:
        results.append({"width": width, "tiles": num_tiles, "layer": name})
        ways.append({"train": way})

    for width in dict.fromkeys(width for width, _ in sizes):
        add(width, None, "dense", dense(width))
    for width, num_tiles in sizes:
        made = layers(width, num_tiles)
        for name, layer in made.items():
            add(width, num_tiles, name, layer)
        h_TD = torch.randn(batch * length, width)
        add_part(width, num_tiles, "product", partial(product, h_TD, torch.randn(num_tiles, width)))
        add_part(width, num_tiles, "routing", partial(routing, made["v2"].layer, h_TD.clone().requires_grad_()))
    interleave(results, ways, repeats)
    return results


def interleave(results: list[dict[str, Any]], ways: list[dict[str, Callable[[], None]]], repeats: int) -> None:
    for result, way in zip(results, ways, strict=True):
        result |= {f"{mode}_{kind}": [] for mode in way for kind in ("ms", "wall_ms")}
    for round_idx in range(repeats):
        start = round_idx * len(ways) // repeats
        for position in chain(range(start, len(ways)), range(start)):
            for mode, way in ways[position].items():
                way()
                wall, cpu = time.perf_counter(), time.thread_time()
                way()
                results[position][f"{mode}_ms"].append(1e3 * (time.thread_time() - cpu))
                results[position][f"{mode}_wall_ms"].append(1e3 * (time.perf_counter() - wall))


def train(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    # Gradients are added up, as between two steps of an optimizer: no time goes into giving them up.
    y, aux = layer.train()(x)
    if aux.requires_grad:
        torch.autograd.backward([y, aux], [grad, torch.ones_like(aux)])
    else:
        y.backward(grad)


@torch.no_grad()
def evaluate(layer: nn.Module, x: Tensor) -> None:
    layer.eval()(x)


@torch.no_grad()
def product(h_TD: Tensor, signature_ED: Tensor) -> None:
    score_TE = h_TD @ signature_ED.T
    score_TE @ signature_ED
    score_TE.T @ h_TD


def routing(layer: SparseLookupFFNv2, h_TD: Tensor) -> None:
    tile_idx_T1, score_TE = layer.router.select(h_TD)
    balance_loss(score_TE, tile_idx_T1).backward()


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    ours = {tensor.untyped_storage().data_ptr() for tensor in chain(layer.parameters(), layer.buffers(), [x])}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(seen.values())


def find(results: list[dict[str, Any]], width: int, num_tiles: int | None, layer: str) -> dict[str, Any] | None:
    wanted = (width, num_tiles, layer)
    return next((result for result in results if (result["width"], result["tiles"], result["layer"]) == wanted), None)


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios, round by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), low, high


def targets(results: list[dict[str, Any]]) -> list[str]:
    lines = []

    def compare(what: str, above: dict[str, Any] | None, below: dict[str, Any] | None, limit: float, is_least: bool) -> None:
        if above is not None and below is not None:
            median, low, high = ratio(above["train_ms"], below["train_ms"])
            is_met = median >= limit if is_least else median <= limit
            sign = ">=" if is_least else "<="
            lines.append(f"| {what} | {sign} {limit} | {median:.2f} ({low:.2f} to {high:.2f}) | {'yes' if is_met else 'no'} |")

    for num_tiles, limit in ((64, 5.0), (256, 14.0)):
        pair = (find(results, 128, num_tiles, "loop"), find(results, 128, num_tiles, "v2"))
        compare(f"loop / v2, D = 128, {num_tiles} tiles", *pair, limit, True)
    for width, num_tiles, limit in ((128, 64, 0.35), (512, 256, 0.2)):
        pair = (find(results, width, num_tiles, "v2"), find(results, width, None, "dense"))
        compare(f"v2 / dense, D = {width}, {num_tiles} tiles", *pair, limit, False)
    tiles = [num_tiles for num_tiles in (16, 64, 256, 1024) if find(results, 128, num_tiles, "v2")]
    for part in ("product", "routing"):
        rest = [without(results, 128, num_tiles, part) for num_tiles in tiles]
        if len(rest) > 1:
            spread = max(rest) / min(rest)
            what = f"v2 less {part}, D = 128, {tiles[0]} to {tiles[-1]} tiles: largest / smallest"
            lines.append(f"| {what} | <= 1.3 | {spread:.2f} | {'yes' if spread <= 1.3 else 'no'} |")
    return lines


def without(results: list[dict[str, Any]], width: int, num_tiles: int, part: str) -> float:
    """Median ms of v2 in training, less that of a part measured alone."""
    layer, alone = find(results, width, num_tiles, "v2"), find(results, width, num_tiles, part)
    assert layer is not None
    assert alone is not None
    return statistics.median(a - b for a, b in zip(layer["train_ms"], alone["train_ms"], strict=True))


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| D | tiles | layer | train ms | / dense (quartiles) | eval ms | parameters MB | saved MB |", "|---" * 8 + "|"]
    for result in results:
        reference = find(results, result["width"], None, "dense")
        assert reference is not None
        median, low, high = ratio(result["train_ms"], reference["train_ms"])
        start = (
            f"| {result['width']} | {result['tiles'] or ''} | {result['layer']} | {statistics.median(result['train_ms']):.1f} "
        )
        rest = "| | | |"
        if "eval_ms" in result:
            memory = (result[key] / 1e6 for key in ("parameter_bytes", "saved_bytes"))
            rest = f"| {statistics.median(result['eval_ms']):.1f} | " + " | ".join(f"{value:.2f}" for value in memory) + " |"
        rows.append(f"{start}| {median:.2f} ({low:.2f} to {high:.2f}) {rest}")
    return "\n".join(
        [*rows, "", "| ratio, training | target | median (quartiles) | reached |", "|---" * 4 + "|", *targets(results)]
    )


def figure(results: list[dict[str, Any]]) -> "Figure":
    """Training time by number of tiles, a panel for each width."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(result["width"] for result in results))
    drawn = Figure(figsize=(5.5 * len(widths), 4.2), layout="constrained")
    for axes, width in zip(drawn.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        for name in ("loop", "mixture", "trix", "v1", "v2", "product"):
            points = [
                (result["tiles"], result["train_ms"])
                for result in results
                if (result["width"], result["layer"]) == (width, name)
            ]
            style = {"linestyle": ":", "color": "grey"} if name == "product" else {"marker": "o"}
            label = "score product alone" if name == "product" else name
            axes.plot([tiles for tiles, _ in points], [statistics.median(ms) for _, ms in points], label=label, **style)
        reference = find(results, width, None, "dense")
        assert reference is not None
        axes.axhline(statistics.median(reference["train_ms"]), color="black", linestyle="--", label="dense 4 D")
        tiles = sorted({result["tiles"] for result in results if result["width"] == width and result["tiles"]})
        axes.set(xscale="log", yscale="log", xticks=tiles, xticklabels=tiles, title=f"D = {width}")
        axes.set(xlabel="tiles", ylabel="forward + backward, ms of CPU")
        axes.minorticks_off()
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return drawn
