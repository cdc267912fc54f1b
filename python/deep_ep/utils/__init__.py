"""Names that callers of DeepEP look for here."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
