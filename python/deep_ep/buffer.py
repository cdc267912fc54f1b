"""The class that callers of DeepEP know, over the native module."""

import atexit
import sys
import weakref

from . import _C
from ._arrays import library_of, library_of_dtype
from ._cuda import CudaMemory, comm_stream_of, require_gpu
from ._groups import bootstrap_of, rank_and_size
from ._low_latency import LowLatency
from ._rows import Extras, Rows
from .config import combine_config, default_values, dispatch_config
from .event import EventHandle, EventOverlap, no_event

_alive = weakref.WeakSet()
_NO_LAYOUT = (None, None, None)
_PLAIN = (None, False, False)  # previous_event, async_finish, allocate_on_comm_stream


@atexit.register
def _destroy_all():
    """Before the interpreter goes: what the library's threads hold of it goes now."""
    failure = None
    for buffer in list(_alive):
        try:
            buffer.destroy()
        except Exception as error:  # said when all the others are destroyed
            failure = failure or error
    if failure is not None:
        raise failure


def _choose_device(device):
    """The ordinal of the GPU that a Buffer works on, -1 for the host."""
    torch = sys.modules.get("torch")
    if device is None:
        return torch.cuda.current_device() if torch and torch.cuda.is_available() else -1
    if isinstance(device, int):
        return device
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return -1
    if kind != "cuda":
        raise ValueError(f"device is {device!r}, must be None, 'cpu', 'cuda', 'cuda:N' or N")
    return int(index) if index else require_gpu().cuda.current_device()


def _milliseconds(timeout):
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout is {timeout!r}, must be more than 0 seconds, or None")
    return max(1, round(timeout * 1000))


def _event_of(previous_event):
    """The native event of an EventOverlap or EventHandle, if there is one."""
    if previous_event is None:
        return None
    event = getattr(previous_event, "event", previous_event)
    if event is None:
        return None
    native = getattr(event, "_event", None)
    if native is None:
        raise TypeError(f"previous_event is {previous_event!r}, must be an EventOverlap, an "
                        "EventHandle or None")
    return native


class Buffer(LowLatency, Rows):
    """One rank's end of the exchange: memory that its peers map, and the calls that move tokens
    through it.

    R ranks of one node or several, N tokens of this rank, H values a row, K experts a token, E
    experts, L = E/R of them local, Nr rows received. Arrays are torch tensors or NumPy arrays (with
    ml_dtypes); results are of the library of a call's first argument. They lie on the Buffer's
    device: the current CUDA device at construction, or the host where torch has none.

    Construction is collective; so are dispatch and combine, which every rank calls in the same
    order. Calls on one Buffer come one at a time, from any thread; the GIL is released while they
    wait. Unless `async_finish`, the current stream (on the host: the calling thread) waits for a
    call; with it, the returned event has to be waited for, and inputs must not change until then.
    Results and handles stay valid when the Buffer is destroyed. Failures are `deep_ep.Error`, after
    which the Buffer refuses all but `destroy`.
    """

    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False,
                 num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False,
                 explicitly_destroy=False, enable_shrink=False, comm=None, *, use_fabric=False,
                 device=None, timeout=None, num_threads=0):
        """`group`: a torch.distributed group of any backend, an mpi4py communicator (also as
        `comm`), or a `deep_ep.Group`. The byte counts, see `Config`, are starting sizes. `timeout`
        is in seconds, for one wait for other ranks (None: DEEP_EP_TIMEOUT_MS, else 100 s);
        `num_threads` are worker threads on the host. `device` is "cpu" for the host on a machine
        with GPUs. The other arguments are accepted for callers of DeepEP.
        """
        group_or_comm = comm if group is None else group
        if group_or_comm is None:
            raise ValueError("group is None and so is comm; one of them is needed")
        self.group = group_or_comm
        self.rank, self.group_size = rank_and_size(group_or_comm)
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._device = _choose_device(device)
        self._memory = None if self._device < 0 else CudaMemory(self._device)
        options = {
            "device": self._device,
            "num_nvl_bytes": int(num_nvl_bytes),
            "num_rdma_bytes": int(num_rdma_bytes),
            "low_latency_mode": bool(low_latency_mode),
            "num_qps_per_rank": int(num_qps_per_rank),
            "allow_nvlink_for_low_latency_mode": bool(allow_nvlink_for_low_latency_mode),
            "allow_mnnvl": bool(allow_mnnvl),
            "use_fabric": bool(use_fabric),
            "explicitly_destroy": bool(explicitly_destroy),
            "enable_shrink": bool(enable_shrink),
            "timeout_ms": 0 if timeout is None else _milliseconds(timeout),
            "num_threads": num_threads,
        }
        allocator = None if self._memory is None else self._memory.allocator()
        self.runtime = _C.Buffer(bootstrap_of(group_or_comm), options, allocator)
        self._num_nodes = self.runtime.get_num_rdma_ranks()
        if self._memory is not None:
            self._memory.set_comm_stream(self.runtime.comm_stream())
        self._in_flight = []  # of asynchronous calls on the host: (event, what they use)
        _alive.add(self)

    # -- what belongs to no Buffer

    @staticmethod
    def is_sm90_compiled():
        """True if the library's part for GPUs, which is of sm_90 and newer, is found where a Buffer
        looks for it, and loads. Needs no GPU."""
        return _C.has_cuda_parts()

    @staticmethod
    def set_num_sms(new_num_sms):
        """SMs (on the host: threads) that calls without `config` may take. Any number from 1."""
        if not isinstance(new_num_sms, int) or new_num_sms < 1:
            raise ValueError(f"new_num_sms is {new_num_sms!r}, must be an int from 1")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture():
        """An event of what the current stream has now, for `previous_event`."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks):
        """The Config of a dispatch that is given none; for any number of ranks."""
        return dispatch_config(Buffer.num_sms, num_ranks)

    @staticmethod
    def get_combine_config(num_ranks):
        """The Config of a combine that is given none; for any number of ranks."""
        return combine_config(Buffer.num_sms, num_ranks)

    # -- the Buffer itself

    def __deepcopy__(self, memo):
        """Itself: a copy of a module shares its Buffer, since making one is collective."""
        return self

    def destroy(self):
        """Releases everything but memory under live results. Local; idempotent."""
        self.runtime.destroy()
        self._in_flight.clear()
        if self._memory is not None:
            self._memory.close()

    def get_comm_stream(self):
        """The stream on which calls run: a torch.cuda.Stream; on the host that of the CPU."""
        return comm_stream_of(self.runtime.comm_stream(), self._device)

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """The rank's own memory that ranks of its node map, from `offset` bytes on, as elements of
        `dtype`: of shape `size`, else all of it. Whichever kind of buffer is asked for."""
        library = library_of_dtype(dtype)
        tensor = library.typed(self.runtime.local_buffer(library.native, library.code(dtype),
                                                         offset), dtype)
        if size is None:
            return tensor
        count = 1
        for length in size:
            count *= length
        if tensor.shape[0] < count:
            raise ValueError(f"size is {tuple(size)}, the buffer has {tensor.shape[0]} elements "
                             f"from offset {offset} on")
        return tensor[:count].reshape(tuple(size))

    def reserve(self, num_bytes):
        """Collective: maps memory ahead so that `num_bytes` of results fit without growth."""
        self.runtime.reserve(num_bytes)

    def check(self):
        """Raises the Error that faulted this Buffer, if any."""
        self.runtime.check()

    def _options(self, previous_event, async_finish, allocate_on_comm_stream):
        if (previous_event, async_finish, allocate_on_comm_stream) == _PLAIN:
            return ()  # the native module finds the current stream by itself
        stream = 0 if self._memory is None else self._memory.current_stream()
        event = None if previous_event is None else _event_of(previous_event)
        if event is not None and self._memory is not None and self._memory.is_capturing():
            # Memory of a graph is the current stream's, so the call has to come behind that too.
            event.stream_wait(stream, self._device)
            event = allocate_on_comm_stream = None
        return stream, self._device, event, async_finish, bool(allocate_on_comm_stream)

    def _config_values(self, config, is_dispatch):
        if config is None:
            get_default, original = _DEFAULTS[is_dispatch]
            get_default = getattr(self, get_default)
            if get_default is original:
                return default_values(is_dispatch, Buffer.num_sms, self.group_size)
            config = get_default(self.group_size)  # somebody's own
        return config._values()

    def _end(self, event, used, results):
        """The event to return of an asynchronous call that used the arrays `used` of its caller."""
        if self._memory is not None:
            return EventOverlap(EventHandle._of(event), self._memory.hold(used, results))
        self._in_flight = [one for one in self._in_flight if not one[0].query()]
        self._in_flight.append((event, used))
        return EventOverlap(EventHandle._of(event))

    # -- high throughput

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False,
                            allocate_on_comm_stream=False):
        """Which tokens of `topk_idx` ([N, K] int64 or int32, -1 for none) go where. Local.

        Returns (num_tokens_per_rank int32[R], num_tokens_per_rdma_rank int32[nodes], None while all
        ranks are of one node, num_tokens_per_expert int32[E], is_token_in_rank bool[N, R], event).
        """
        library = library_of(topk_idx, "topk_idx")
        *result, event = self.runtime.get_dispatch_layout(
            library.native, topk_idx, num_experts,
            self._options(previous_event, async_finish, allocate_on_comm_stream))
        return *result, self._end(event, (topk_idx,), result) if async_finish else no_event()

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
                 is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None,
                 topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None,
                 previous_event=None, async_finish=False, allocate_on_comm_stream=False, *,
                 dispatch_wait_recv_cost_stats=None, num_experts=None, prepared=None, recv_x=None,
                 recv_topk_idx=None, recv_topk_weights=None):
        """Sends every token's row once to each rank that owns one of its experts. Collective.

        `x`: [N, H], rows of a multiple of 16 bytes, or a pair with scales [N, S] float32 or int32
        of any strides. Either the layout is given, usually with `topk_idx` and `topk_weights`
        float32 [N, K], or `handle` of an earlier dispatch, which moves `x` alone as that one did.
        `num_worst_tokens` > 0: results have so many rows, and the call does not wait for counts;
        a handle knows its rows, so with one the number is not looked at.

        By keyword only: `num_experts`, with `topk_idx`, in place of a layout; `prepared`, from
        prepare_dispatch, in place of counting; `recv_x` (a pair if `x` is one), `recv_topk_idx` and
        `recv_topk_weights`, outputs that the caller brings: contiguous, of at least as many rows as
        arrive, of which the result is then the first. A `recv_x` that lies in an earlier result is
        written by the peers directly, others are copied to. `dispatch_wait_recv_cost_stats`: int64
        [R], += the longest wait for each source, in ns (host) or SM cycles; over several nodes for
        each rank that this one waits for itself: what others pass on here counts as theirs.

        Returns (recv_x or (recv_x, recv_scales), recv_topk_idx with local expert ids and -1,
        recv_topk_weights, rows for each local expert rounded up to `expert_alignment` as a list,
        handle, event). Rows are in (source rank, token) order. With `handle`: (recv_x, None, None,
        None, None, event). A handle is a plain tuple of 6 arrays, with several nodes of 10.
        `num_tokens_per_rdma_rank` is not needed.
        """
        extras = None
        if (num_experts is not None or prepared is not None or recv_x is not None
                or recv_topk_idx is not None or recv_topk_weights is not None):
            outputs = (recv_x, recv_topk_idx, recv_topk_weights, None)
            extras = Extras(num_experts, prepared, outputs)
        return self._dispatch(
            x, handle, (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank),
            (topk_idx, topk_weights), (expert_alignment, num_worst_tokens), config,
            dispatch_wait_recv_cost_stats,
            (previous_event, async_finish, allocate_on_comm_stream), extras)

    def _dispatch(self, x, handle, layout, topk, numbers, config, stats, when, extras):
        x, x_scales = x if isinstance(x, tuple) else (x, None)
        library = library_of(x, "x")
        if handle is not None:
            layout, numbers = _NO_LAYOUT, (numbers[0], 0)
        recv_x, recv_scales, ids, weights, counts, new_handle, event, more = self.runtime.dispatch(
            library.native, (x, x_scales), topk, handle, layout, numbers,
            self._config_values(config, True), stats,
            () if when == _PLAIN else self._options(*when),
            None if extras is None else extras.values())
        if x_scales is not None:
            recv_x = (recv_x, recv_scales)
        if handle is not None:
            ids = weights = counts = new_handle = None
        if extras is None and not when[1]:
            return recv_x, ids, weights, counts, new_handle, no_event()
        result, grouped = (recv_x, ids, weights, counts, new_handle), ()
        if extras is not None:
            result = extras.received(result, more[0])
            grouped = extras.grouped(more)
        if not when[1]:
            return *result, no_event(), *grouped
        used = (x, x_scales, topk, layout, handle, () if extras is None else extras.used())
        return *result, self._end(event, used, result + grouped), *grouped

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None,
                async_finish=False, allocate_on_comm_stream=False, *,
                combine_wait_recv_cost_stats=None, groups=None):
        """Brings rows back to their tokens and sums them in fp32, ranks in ascending order.
        Collective.

        `x`: [Nr, H] bfloat16, float16 or float32: a row for each received one, already weighted and
        summed over this rank's experts. `topk_weights` float32 [Nr, K] are summed alike. `bias`:
        one array [N, H] or a pair of them, added behind the rows. The handle is not changed.
        `groups`, by keyword only, of the dispatch_grouped that the handle is of: `x` is then
        [G, H], a row for each grouped one, which are first weighed by `groups.weights`, unless that
        is None, and summed for each received row.

        Returns (combined_x [N, H], combined_topk_weights [N, K] or None, event).
        """
        library = library_of(x, "x")
        first_bias, second_bias = bias if isinstance(bias, tuple) else (bias, None)
        combined_x, combined_weights, event = self.runtime.combine(
            library.native, (x, topk_weights, first_bias, second_bias), handle,
            self._config_values(config, False), combine_wait_recv_cost_stats,
            self._options(previous_event, async_finish, allocate_on_comm_stream), groups)
        if not async_finish:
            return combined_x, combined_weights, no_event()
        return combined_x, combined_weights, self._end(
            event, (x, topk_weights, bias, handle, groups), (combined_x, combined_weights))

    def internode_dispatch(self, x, handle=None, num_tokens_per_rank=None,
                           num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                           num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
                           expert_alignment=1, num_worst_tokens=0, config=None,
                           previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """What dispatch does over several nodes; refused on one."""
        self._require_several_nodes("internode_dispatch", "dispatch")
        return self._dispatch(
            x, handle, (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank),
            (topk_idx, topk_weights), (expert_alignment, num_worst_tokens), config, None,
            (previous_event, async_finish, allocate_on_comm_stream), None)

    def internode_combine(self, x, handle, topk_weights=None, bias=None, config=None,
                          previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """What combine does over several nodes; refused on one."""
        self._require_several_nodes("internode_combine", "combine")
        return self.combine(x, handle, topk_weights, bias, config, previous_event, async_finish,
                            allocate_on_comm_stream)

    def _require_several_nodes(self, name, other):
        if self._num_nodes == 1:
            raise RuntimeError(f"{name}: all ranks are of one node, use {other}")


# What a call without `config` asks, and what answers unless somebody has replaced it.
_DEFAULTS = {True: ("get_dispatch_config", Buffer.get_dispatch_config),
             False: ("get_combine_config", Buffer.get_combine_config)}
