"""How much of the machine a call may take."""

from functools import lru_cache

from . import _C


def clamped(number, bits):
    """The nearest int of so many bits, for hints, which do not raise; of NaN the largest."""
    most = (1 << (bits - 1)) - 1
    return int(max(-most, min(most, number)))


class Config:
    """How much of the machine a high-throughput call may take, and how it chunks its traffic.

    `num_sms`: SMs (CUDA) or worker threads (host) at most. The others count rows: written before
    the receiver is told (`send`), and in flight from one rank to another (`recv`); of the RDMA ones
    nothing depends while all ranks are of one node. Any value from 1, send <= recv; raises
    `deep_ep.Error` otherwise.
    """

    def __init__(self, num_sms=20, num_max_nvl_chunked_send_tokens=6,
                 num_max_nvl_chunked_recv_tokens=256, num_max_rdma_chunked_send_tokens=6,
                 num_max_rdma_chunked_recv_tokens=256):
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens
        _C.validate_config(self._values())

    def _values(self):
        return (self.num_sms, self.num_max_nvl_chunked_send_tokens,
                self.num_max_nvl_chunked_recv_tokens, self.num_max_rdma_chunked_send_tokens,
                self.num_max_rdma_chunked_recv_tokens)

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes to pass as `num_nvl_bytes` of a Buffer for rows of `hidden_bytes` bytes. Never
        raises for numbers."""
        return _C.get_nvl_buffer_size_hint(self._values(), clamped(hidden_bytes, 64),
                                           clamped(num_ranks, 32))

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Bytes to pass as `num_rdma_bytes`; 0 while all ranks are of one node. Never raises for
        numbers."""
        return _C.get_rdma_buffer_size_hint(self._values(), clamped(hidden_bytes, 64),
                                            clamped(num_ranks, 32))

    def __repr__(self):
        return f"Config{self._values()}"


# What users of DeepEP are used to for numbers of ranks: (nvl send, nvl recv, rdma send, rdma recv).
_DISPATCH = {
    2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128),
    24: (32, 288, 8, 128), 32: (32, 288, 8, 128), 48: (32, 288, 8, 128), 64: (32, 288, 8, 128),
    96: (20, 480, 12, 128), 128: (20, 560, 12, 128), 144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE = {
    2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128),
    24: (1, 288, 8, 128), 32: (1, 288, 8, 128), 48: (1, 288, 8, 128), 64: (1, 288, 8, 128),
    96: (1, 480, 8, 128), 128: (1, 560, 8, 128), 144: (2, 720, 8, 128), 160: (2, 720, 8, 128),
}


def _row(table, num_ranks):
    """The row of the next larger number of ranks, beyond the table its last."""
    return table[min((known for known in table if known >= num_ranks), default=max(table))]


@lru_cache
def default_values(is_dispatch, num_sms, num_ranks):
    """The values of the Config of a call that is given none."""
    return (num_sms, *_row(_DISPATCH if is_dispatch else _COMBINE, num_ranks))


def dispatch_config(num_sms, num_ranks):
    return Config(num_sms, *_row(_DISPATCH, num_ranks))


def combine_config(num_sms, num_ranks):
    return Config(num_sms, *_row(_COMBINE, num_ranks))
