"""TriX: sparse networks you can read. Ternary tiles {-1, 0, +1}, routed by short ternary signatures."""

from trix.nn import TriXBlock, TriXFFN, TriXLinear, TriXStack

__all__ = ["TriXBlock", "TriXFFN", "TriXLinear", "TriXStack"]
