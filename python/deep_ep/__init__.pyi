"""Types of what users call. `Array` is a torch.Tensor, or a numpy.ndarray for programs without
torch; a call's results are of the library of its arguments. `X | Any` is X or None, as the call's
arguments say."""

from collections.abc import Callable
from typing import Any, NamedTuple, Sequence, Union

import numpy
import torch

Array = Any
DType = Union[torch.dtype, "numpy.dtype[Any]", type]
IntranodeHandle = tuple[Array, Array, Array, Array, Array, Array]
InternodeHandle = tuple[Array, Array, Array, Array, Array, Array, Array, Array, Array, Array]
Handle = Union[IntranodeHandle, InternodeHandle]
LowLatencyHandle = tuple[Array, Array, int, int, int]

__version__: str
topk_idx_t: torch.dtype

class Error(RuntimeError):
    code: str
    ranks: list[int]

class Group:
    @classmethod
    def from_environment(cls) -> Group: ...
    @classmethod
    def tcp(cls, rank: int, size: int, address: str = "127.0.0.1", port: int = 29477,
            timeout: float = 100.0) -> Group: ...
    def rank(self) -> int: ...
    def size(self) -> int: ...
    def all_gather_bytes(self, mine: bytes) -> list[bytes]: ...

class Config:
    num_sms: int
    num_max_nvl_chunked_send_tokens: int
    num_max_nvl_chunked_recv_tokens: int
    num_max_rdma_chunked_send_tokens: int
    num_max_rdma_chunked_recv_tokens: int
    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6,
                 num_max_nvl_chunked_recv_tokens: int = 256,
                 num_max_rdma_chunked_send_tokens: int = 6,
                 num_max_rdma_chunked_recv_tokens: int = 256) -> None: ...
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...
    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...

class EventHandle:
    def __init__(self) -> None: ...
    def current_stream_wait(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...

class EventOverlap:
    event: EventHandle | None
    extra_tensors: Any
    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None: ...
    def current_stream_wait(self) -> None: ...
    def __enter__(self) -> EventOverlap: ...
    def __exit__(self, *_: object) -> None: ...

class PreparedDispatch(NamedTuple):
    handle: tuple[Array | None, ...]
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    num_experts: int
    expert_alignment: int
    num_rdma_recv_tokens: int

class RowGroups(NamedTuple):
    group_offsets: Array
    grouped_rows: Array
    recv_rows: Array
    weights: Array | None

class GroupedDispatch(NamedTuple):
    recv_x: Array | tuple[Array, Array]
    recv_topk_idx: Array | None
    recv_topk_weights: Array | None
    num_recv_tokens_per_expert_list: list[int] | None
    handle: Handle | Any
    event: EventOverlap
    grouped_x: Array | tuple[Array, Array]
    groups: RowGroups

class Buffer:
    num_sms: int
    group: Any
    rank: int
    group_size: int
    num_nvl_bytes: int
    num_rdma_bytes: int
    low_latency_mode: bool
    explicitly_destroy: bool
    enable_shrink: bool
    runtime: Any
    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
                 low_latency_mode: bool = False, num_qps_per_rank: int = 24,
                 allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
                 explicitly_destroy: bool = False, enable_shrink: bool = False, comm: Any = None,
                 *, use_fabric: bool = False, device: str | int | torch.device | None = None,
                 timeout: float | None = None, num_threads: int = 0) -> None: ...
    @staticmethod
    def is_sm90_compiled() -> bool: ...
    @staticmethod
    def set_num_sms(new_num_sms: int) -> None: ...
    @staticmethod
    def capture() -> EventOverlap: ...
    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config: ...
    @staticmethod
    def get_combine_config(num_ranks: int) -> Config: ...
    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int,
                                       num_ranks: int, num_experts: int) -> int: ...
    def destroy(self) -> None: ...
    def get_comm_stream(self) -> Any: ...
    def get_local_buffer_tensor(self, dtype: DType, size: Sequence[int] | None = None,
                                offset: int = 0, use_rdma_buffer: bool = False) -> Array: ...
    def reserve(self, num_bytes: int) -> None: ...
    def check(self) -> None: ...
    def get_dispatch_layout(
        self, topk_idx: Array, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Array, Array | None, Array, Array, EventOverlap]: ...
    def dispatch(
        self, x: Array | tuple[Array, Array], handle: Handle | None = None,
        num_tokens_per_rank: Array | None = None, num_tokens_per_rdma_rank: Array | None = None,
        is_token_in_rank: Array | None = None, num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None, topk_weights: Array | None = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False, *,
        dispatch_wait_recv_cost_stats: Array | None = None, num_experts: int | None = None,
        prepared: PreparedDispatch | None = None,
        recv_x: Array | tuple[Array, Array] | None = None, recv_topk_idx: Array | None = None,
        recv_topk_weights: Array | None = None,
    ) -> tuple[Array | tuple[Array, Array], Array | None, Array | None, list[int] | None,
               Handle | Any, EventOverlap]: ...
    def prepare_dispatch(
        self, x: Array | tuple[Array, Array], num_tokens_per_rank: Array | None = None,
        is_token_in_rank: Array | None = None, num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None, topk_weights: Array | None = None,
        expert_alignment: int = 1, config: Config | None = None,
        previous_event: EventOverlap | None = None, *, num_experts: int | None = None,
    ) -> PreparedDispatch: ...
    def dispatch_grouped(
        self, x: Array | tuple[Array, Array], handle: Handle | None = None,
        groups: RowGroups | None = None, num_tokens_per_rank: Array | None = None,
        is_token_in_rank: Array | None = None, num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None, topk_weights: Array | None = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False, *,
        dispatch_wait_recv_cost_stats: Array | None = None, num_experts: int | None = None,
        prepared: PreparedDispatch | None = None,
        recv_x: Array | tuple[Array, Array] | None = None, recv_topk_idx: Array | None = None,
        recv_topk_weights: Array | None = None,
        grouped_x: Array | tuple[Array, Array] | None = None,
    ) -> GroupedDispatch: ...
    def combine(
        self, x: Array, handle: Handle, topk_weights: Array | None = None,
        bias: Array | tuple[Array, Array] | None = None, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False, *,
        combine_wait_recv_cost_stats: Array | None = None, groups: RowGroups | None = None,
    ) -> tuple[Array, Array | None, EventOverlap]: ...
    def internode_dispatch(
        self, x: Array | tuple[Array, Array], handle: Handle | None = None,
        num_tokens_per_rank: Array | None = None, num_tokens_per_rdma_rank: Array | None = None,
        is_token_in_rank: Array | None = None, num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None, topk_weights: Array | None = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Array | tuple[Array, Array], Array | None, Array | None, list[int] | None,
               Handle | Any, EventOverlap]: ...
    def internode_combine(
        self, x: Array, handle: Handle, topk_weights: Array | None = None,
        bias: Array | tuple[Array, Array] | None = None, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Array, Array | None, EventOverlap]: ...
    def low_latency_dispatch(
        self, x: Array, topk_idx: Array, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Array | None = None,
        dispatch_wait_recv_cost_stats: Array | None = None, use_fp8: bool = True,
        round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Array | tuple[Array, Array], Array, LowLatencyHandle, EventOverlap,
               Callable[[], None] | Any]: ...
    def low_latency_combine(
        self, x: Array, topk_idx: Array, topk_weights: Array, handle: LowLatencyHandle,
        use_logfmt: bool = False, zero_copy: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, out: Array | None = None,
        combine_wait_recv_cost_stats: Array | None = None, *, use_fp8: bool = False,
    ) -> tuple[Array, EventOverlap, Callable[[], None] | Any]: ...
    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Array: ...
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int,
                                 num_experts: int) -> None: ...
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None: ...
    def low_latency_query_mask_buffer(self, mask_status: Array) -> None: ...
    def low_latency_clean_mask_buffer(self) -> None: ...
