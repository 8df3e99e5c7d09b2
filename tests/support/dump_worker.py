"""Dumps in a process of its own: python dump_worker.py FOLDER

First it prints by how many bytes the peak memory grows from a dump of 2 shards to one of 40. Then it dumps to FOLDER/whole, and
prints, for each moment, the exit code of a forked process that begins the same dump in FOLDER/MOMENT and dies by SIGKILL there.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import save
from small_dumps import ragged_frame, trix_backend

import trix.whole_file
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.superposition import DumpConfig
from trix.superposition.backends import TriXBackend, io_store
from trix.superposition.dump import dump_layer_activations, dump_sites
from trix.superposition.dump.batch_rows import RowReader
from trix.superposition.dump.manifest import Manifest

CFG = DumpConfig(layer=1, max_len=40, batch_size=16, shard_tokens=500)
SITES = ["resid_pre.0", "ffn_out.1"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(number: int, act: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """``act``, but ``instead`` the n-th time."""
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == number else act)(*given, **named)

    return counted


def write_half_and_die(columns: dict[str, Any], path: Path) -> None:
    content = save(columns)
    path.write_bytes(content[: len(content) // 2])
    die()


def in_the_model() -> None:
    RowReader.read = nth(5, RowReader.read, lambda *_: die())  # type: ignore[method-assign]


def in_a_shard() -> None:
    io_store.save_file = nth(4, io_store.save_file, write_half_and_die)  # type: ignore[attr-defined]


def between_shard_and_manifest() -> None:
    Manifest.write = nth(3, Manifest.write, lambda *_: die())  # type: ignore[method-assign]


def between_two_manifests() -> None:
    Manifest.write = nth(4, Manifest.write, lambda *_: die())  # type: ignore[method-assign]


def before_any_manifest() -> None:
    Manifest.write = nth(1, Manifest.write, lambda *_: die())  # type: ignore[method-assign]


MOMENTS = (in_the_model, in_a_shard, between_shard_and_manifest, between_two_manifests, before_any_manifest)


def dump(folder: Path) -> None:
    dump_sites(ragged_frame(), "title", "topic", trix_backend(), CFG, SITES, folder)


def kill(folder: Path) -> None:
    dump(folder / "whole")  # also imports what the forked processes need
    for moment in MOMENTS:
        child = os.fork()
        if child == 0:
            moment()
            dump(folder / moment.__name__)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(moment.__name__, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def memory(folder: Path) -> None:
    """A shard is 2 MiB, so that 40 of them are 80 MiB."""
    config = LanguageModelConfig(d_model=256, num_layers=1, n_heads=2, context_length=128, ffn=FFNConfig(kind="none"))
    backend = TriXBackend(LanguageModel(2, config), "ab")
    cfg = DumpConfig(layer=0, max_len=128, batch_size=32, dtype="fp32", shard_tokens=2048)
    peaks = []
    for number, name in ((32, "small"), (640, "large")):
        frame = pd.DataFrame({"title": ["ab" * 64] * number, "topic": [0] * number})
        dump_layer_activations(frame, "title", "topic", backend, cfg, folder / name)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(len(list((folder / "large").glob("*.safetensors"))), peaks[1] - peaks[0], flush=True)


if __name__ == "__main__":
    trix.whole_file._sync = lambda _: None  # it takes most of the time, and only a power failure would show it
    memory(Path(sys.argv[1]) / "memory")
    kill(Path(sys.argv[1]))
