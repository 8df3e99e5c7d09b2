"""Reading a routed model: introspector, figures, report. Changes nothing in it."""

from trix.introspection.capture import Capture
from trix.introspection.introspector import Explanation, TriXIntrospector
from trix.introspection.report import html_report

__all__ = ["Capture", "Explanation", "TriXIntrospector", "html_report"]
