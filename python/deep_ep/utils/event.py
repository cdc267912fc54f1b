"""Another place where callers of DeepEP look for events."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
