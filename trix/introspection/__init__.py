"""Reading a routed model: introspector, figures, report. Changes nothing in it.

Loaded when asked for: the parts of a page need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trix.introspection.capture import Capture
    from trix.introspection.introspector import Explanation, TriXIntrospector
    from trix.introspection.ngram_design import design_signature, forecast
    from trix.introspection.ngrams import NgramReader, count_ngrams
    from trix.introspection.report import html_report

__all__ = [
    "Capture",
    "Explanation",
    "NgramReader",
    "TriXIntrospector",
    "count_ngrams",
    "design_signature",
    "forecast",
    "html_report",
]
_MODULES = {
    "Capture": "capture",
    "Explanation": "introspector",
    "NgramReader": "ngrams",
    "TriXIntrospector": "introspector",
    "count_ngrams": "ngrams",
    "design_signature": "ngram_design",
    "forecast": "ngram_design",
    "html_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
