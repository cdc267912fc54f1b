"""Names that callers of DeepEP look for here."""

from .. import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
