"""Sparse autoencoders on the activations of TriX models and of Hugging Face causal language models.

Loaded when asked for: ``import trix.superposition`` loads none of its libraries (``pip install 'trix[superposition]'``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trix.superposition.config import AnalysisConfig, DumpConfig, MergeConfig, Paths, SAEConfig
    from trix.superposition.types import ActivationShard, Latents, MergeMatrix, Reducer2D

__all__ = [
    "ActivationShard",
    "AnalysisConfig",
    "DumpConfig",
    "Latents",
    "MergeConfig",
    "MergeMatrix",
    "Paths",
    "Reducer2D",
    "SAEConfig",
]
_MODULES = {
    **dict.fromkeys(("AnalysisConfig", "DumpConfig", "MergeConfig", "Paths", "SAEConfig"), "config"),
    **dict.fromkeys(("ActivationShard", "Latents", "MergeMatrix", "Reducer2D"), "types"),
}
_SUBPACKAGES = ("analysis", "backends", "data", "dump", "evaluation", "merge", "sae", "steering", "tiles", "viz")


def __getattr__(name: str) -> Any:
    if name not in (*_SUBPACKAGES, *_MODULES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name not in ("pandas", "pydantic"):
            raise
        raise ImportError(f"trix.superposition needs {error.name}: pip install 'trix[superposition]'") from error
    return getattr(module, name) if name in _MODULES else module
