"""Another place where callers of DeepEP look for events."""

from .. import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
