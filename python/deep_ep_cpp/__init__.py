"""Where callers of DeepEP V1 find what was its native module."""

from deep_ep import Buffer, Config, EventHandle

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled",
           "topk_idx_t"]

get_low_latency_rdma_size_hint = Buffer.get_low_latency_rdma_size_hint
is_sm90_compiled = Buffer.is_sm90_compiled


def __getattr__(name):
    if name == "topk_idx_t":
        import deep_ep
        return deep_ep.topk_idx_t
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
