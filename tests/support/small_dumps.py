"""Small models, texts and dumps for the tests of trix.superposition."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.superposition.backends import TriXBackend
from trix.superposition.config import DumpConfig
from trix.superposition.dump import dump_sites

VOCABULARY = "abcdefghijklmnopqrstuvwxyz "


def trix_backend(seed: int = 0, **ffn: object) -> TriXBackend:
    """Three blocks of width 32; layers of tiles routed on hidden states, unless ffn says otherwise."""
    torch.manual_seed(seed)
    settings = FFNConfig(**{"num_tiles": 8, "route_on": "hidden", **ffn})  # type: ignore[arg-type]
    config = LanguageModelConfig(d_model=32, num_layers=3, n_heads=2, context_length=64, ffn=settings)
    return TriXBackend(LanguageModel(len(VOCABULARY), config), VOCABULARY)


def ragged_frame(num_texts: int = 120, longest: int = 40, seed: int = 0, letters: str = "abcdefgh ") -> pd.DataFrame:
    """Random texts of 0 to ``longest`` characters in two classes."""
    draw = np.random.default_rng(seed)
    texts = ["".join(draw.choice(list(letters), size=length)) for length in draw.integers(0, longest + 1, size=num_texts)]
    return pd.DataFrame({"title": texts, "topic": draw.integers(0, 2, size=num_texts)})


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder and those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small_dump(folder: Path, sites: tuple[str, ...] = ("resid_pre.1",), num_texts: int = 120) -> list[Path]:
    """A dump of each site of a small model, of about 2400 tokens, in shards of 1000."""
    config = DumpConfig(max_len=40, batch_size=16, shard_tokens=1000, dtype="fp32")
    return list(dump_sites(ragged_frame(num_texts), "title", "topic", trix_backend(), config, sites, folder).values())
