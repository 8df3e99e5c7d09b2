"""Time of routing by number of tiles: every score (flat), the exact two-level search, and a few clusters (probes, with recall).

One thread, CPU time of that thread, the ways taking turns; top-1, clusters of about sqrt(tiles). Three kinds of signatures and
tokens:

random   signatures without structure, tokens of normal noise: the bounds rule out next to nothing
loose    families of signatures that differ within in 7 % of the positions, tokens near their tile's signature
tight    the same with 1 %

That the exact search gives the flat choice is checked first, up to scores that differ by rounding only.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from turns import interleaved, one_thread

from trix.functional.signatures import inverse_sqrt_active, signature_scores
from trix.functional.two_level_search import two_level_search
from trix.routing.clusters import cluster_members

CHANGED_WITHIN_FAMILY = {"random": None, "loose": 0.07, "tight": 0.01}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384], help="default: %(default)s")
    parser.add_argument("--width", type=int, default=128, help="d_model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")


@torch.no_grad()
def run(tiles: list[int], width: int, tokens: int, probes: list[int], repeats: int) -> list[dict[str, Any]]:
    with one_thread():
        return [measure(kind, n, width, tokens, probes, repeats) for kind in CHANGED_WITHIN_FAMILY for n in tiles]


def measure(kind: str, num_tiles: int, width: int, num_tokens: int, probes: list[int], repeats: int) -> dict[str, Any]:
    torch.manual_seed(num_tiles)
    signatures, x = signatures_and_tokens(kind, num_tiles, width, num_tokens)
    num_clusters = -(-num_tiles // math.ceil(math.sqrt(num_tiles)))
    start = time.thread_time()
    members = cluster_members(signatures * inverse_sqrt_active(signatures).unsqueeze(-1), num_clusters)
    cluster_s = time.thread_time() - start
    bias = torch.zeros(num_tiles)
    search = partial(two_level_search, x, signatures, bias, members, 1)
    probes = [count for count in probes if count < num_clusters]
    ways: dict[str, Callable[[], Any]] = {"flat": partial(flat, x, signatures, bias), "exact": partial(search, 0)}
    ways |= {f"probes_{count}": partial(search, count) for count in probes}
    chosen, num_scored = ways["exact"]()
    check_exact(x, signatures, chosen)
    flat_idx = ways["flat"]()
    return {
        "kind": kind,
        "tiles": num_tiles,
        "clusters": num_clusters,
        "cluster_s": cluster_s,
        "exact_agreement": (chosen == flat_idx).float().mean().item(),
        "exact_scored_share": int(num_scored) / (num_tokens * num_tiles),
        "recall": {str(count): (ways[f"probes_{count}"]()[0] == flat_idx).float().mean().item() for count in probes},
        "ms": {name: [1e3 * second for second in seconds] for name, seconds in interleaved(ways, repeats).items()},
    }


def signatures_and_tokens(kind: str, num_tiles: int, width: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    changed = CHANGED_WITHIN_FAMILY[kind]
    if changed is None:
        return random_ternary(num_tiles, width), torch.randn(num_tokens, width)
    family = random_ternary(math.isqrt(num_tiles), width)[torch.arange(num_tiles) % math.isqrt(num_tiles)]
    # A third of the fresh values is the old one.
    signatures = torch.where(torch.rand(num_tiles, width) < 1.5 * changed, random_ternary(num_tiles, width), family)
    return signatures, signatures[torch.randint(0, num_tiles, (num_tokens,))] + torch.randn(num_tokens, width)


def random_ternary(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape).float()


def flat(x: Tensor, signatures: Tensor, bias: Tensor) -> Tensor:
    # In place, as the exact search does where it gives up: what is compared is the search, not the allocation of scores.
    return (x @ signatures.T).mul_(inverse_sqrt_active(signatures)).add_(bias).argmax(dim=-1, keepdim=True)


def check_exact(x: Tensor, signatures: Tensor, chosen: Tensor) -> None:
    score = signature_scores(x.double(), signatures.double())
    shortfall = (score.amax(dim=-1) - score.gather(1, chosen).squeeze(1)).max().item()
    if shortfall > 1e-4:
        raise AssertionError(f"the score of the exact search's choice falls short by {shortfall}, must be rounding (<= 1e-4)")


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| signatures | tiles | flat ms | exact ms | scored | probes: ms (recall) | clustering s |", "|---" * 7 + "|"]
    for result in results:
        ms = {name: statistics.median(values) for name, values in result["ms"].items()}
        probes = ", ".join(f"{p}: {ms[f'probes_{p}']:.1f} ({recall:.0%})" for p, recall in result["recall"].items())
        rows.append(
            f"| {result['kind']} | {result['tiles']} | {ms['flat']:.1f} | {ms['exact']:.1f} "
            f"| {result['exact_scored_share']:.0%} | {probes} | {result['cluster_s']:.2f} |"
        )
    return "\n".join(rows)
