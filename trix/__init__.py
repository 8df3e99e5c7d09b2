"""TriX: sparse networks you can read. Ternary tiles {-1, 0, +1}, routed by short ternary signatures.

The layers are loaded, and torch with them, when they are asked for: what reads exported files needs neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trix.nn import TriXBlock, TriXFFN, TriXLinear, TriXStack

__all__ = ["TriXBlock", "TriXFFN", "TriXLinear", "TriXStack"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trix import nn

    return getattr(nn, name)
