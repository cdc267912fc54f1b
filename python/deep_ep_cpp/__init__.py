"""Where callers of DeepEP V1 find what was its native module."""

from deep_ep import Config, EventHandle

__all__ = ["Config", "EventHandle", "topk_idx_t"]


def __getattr__(name):
    if name == "topk_idx_t":
        import deep_ep
        return deep_ep.topk_idx_t
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
