"""How much of what is held out stands in the training part, too: windows of one text may overlap.

Shapes: N tokens of the dump, R runs of tokens, H held-out runs.
"""

from typing import TYPE_CHECKING

import numpy as np

from trix.superposition.dump.reader import build_offsets

if TYPE_CHECKING:
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.reader import HeldOut

RUN_TOKENS = 32


def seen_share(dump: "ActivationDump", held_out: "HeldOut", seed: int, num_tokens: int = RUN_TOKENS) -> float:
    """Share of the held-out runs of num_tokens neighbouring tokens of a document which also stand in the training part.

    Runs are compared by a hash of 64 bits. It is nan where every held-out document
    is shorter.

    Raises:
        ValueError: as :meth:`~trix.superposition.dump.ActivationDump.chunks`.
    """
    token_N, document_N, position_N = (dump.column(name).numpy() for name in ("tokids", "titleidx", "position"))
    is_held_out_N = np.zeros(len(token_N), dtype=bool)
    offsets = build_offsets(dump.paths)
    for shard, start, stop in dump.chunks("validation", held_out, seed).tolist():
        is_held_out_N[offsets[shard] + start : offsets[shard] + stop] = True
    num_runs = len(token_N) - num_tokens + 1
    if num_runs < 1:
        return float("nan")
    hash_R = np.zeros(num_runs, dtype=np.uint64)
    for place in range(num_tokens):  # a polynomial of the tokens, modulo 2^64
        hash_R = hash_R * np.uint64(0x9E3779B97F4A7C15) + token_N[place : place + num_runs].astype(np.uint64) + np.uint64(1)
    first, last = slice(num_runs), slice(num_tokens - 1, None)
    is_run_R = (document_N[first] == document_N[last]) & (position_N[last] - position_N[first] == num_tokens - 1)
    is_held_out_R = is_held_out_N[last]
    run_H, known_R = hash_R[is_run_R & is_held_out_R], hash_R[is_run_R & ~is_held_out_R]
    return float(np.isin(run_H, known_R).mean()) if len(run_H) else float("nan")
