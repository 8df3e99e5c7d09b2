"""Reading a routed model: introspector, figures, report. Changes nothing in it."""

from trix.introspection.introspector import Explanation, TriXIntrospector
from trix.introspection.report import html_report

__all__ = ["Explanation", "TriXIntrospector", "html_report"]
