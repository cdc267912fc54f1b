"""The low-latency half of Buffer: small batches through buffers of a fixed size."""

from functools import partial

from . import _C
from ._arrays import library_of
from .config import clamped
from .event import no_event


def _receive(hook, _used):
    """Runs the receiving half of a call, which still uses what its caller gave."""
    hook()


class LowLatency:
    """Methods of Buffer. M is `num_max_dispatch_tokens_per_rank`, the most tokens of any rank.

    With `return_recv_hook` a call only sends, on the current stream, and the hook that it returns
    receives; results are defined behind the hook. Of each kind, dispatch and combine, two calls may
    be sent and not received; a third is refused.
    """

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks,
                                       num_experts):
        """Bytes to pass as `num_rdma_bytes` of a Buffer for calls of this shape. Never raises for
        numbers."""
        return _C.get_low_latency_rdma_size_hint(clamped(num_max_dispatch_tokens_per_rank, 32),
                                                 clamped(hidden, 64), clamped(num_ranks, 32),
                                                 clamped(num_experts, 32))

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None,
                             dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False,
                             use_ue8m0=False, async_finish=False, return_recv_hook=False):
        """Sends every token's row to the ranks of its experts and packs what arrives by expert.
        Collective.

        `x`: [N, H] bfloat16, or float16 or float32 without `use_fp8`, or any type of one byte,
        moved as it is, N at most M; `topk_idx`: [N, K] int64 or int32, -1 for none. With `use_fp8`
        rows of bfloat16 are quantised, 128 values with one scale; `round_scale` makes scales powers
        of two, `use_ue8m0` packs these, four to an int32.
        `cumulative_local_expert_recv_stats` int32 [L]: += rows of each local expert;
        `dispatch_wait_recv_cost_stats` int64 [R]: += the longest wait for each source, in ns (host)
        or SM cycles.

        Returns (recv_x [L, R * M, H] or, of quantised rows, (recv_x, scales [L, R * M, H / 128],
        column by column), rows of each local expert int32 [L], handle, event, hook or None).
        """
        library = library_of(x, "x")
        used = (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        recv_x, scales, count, handle, event, hook = self.runtime.low_latency_dispatch(
            library.native, used, (num_max_dispatch_tokens_per_rank, num_experts),
            (use_fp8, round_scale, use_ue8m0, return_recv_hook),
            self._options(None, True, False) if async_finish else ())
        if scales is not None:
            recv_x = (recv_x, scales)
        return (recv_x, count, handle,
                self._end(event, used, (recv_x, count, handle)) if async_finish else no_event(),
                None if hook is None else partial(_receive, hook, used))

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False,
                            zero_copy=False, async_finish=False, return_recv_hook=False, out=None,
                            combine_wait_recv_cost_stats=None, *, use_fp8=False):
        """Weights the experts' outputs, sums them on the experts' rank and then on the token's.
        Collective.

        `x`: [L, R * M, H] bfloat16, rows as dispatch packed them; `topk_idx` and `topk_weights`
        (float32 [N, K]) as given to dispatch, with its `handle`. `zero_copy`: the rows
        are in what `get_next_low_latency_combine_buffer` returned for this call; `x` is that, or
        says no more than their shape. `use_logfmt`: rows come home in 10 bits a
        value, off by 0.6 % where bfloat16 is by 0.4 %; `use_fp8`: as FP8 with a scale for each 128
        values, off by 6 %. One of them at most, the same on all ranks, H a multiple of 128. `out`:
        [N, H] bfloat16 for the result.

        Returns (combined_x [N, H], event, hook or None).
        """
        library = library_of(x, "x")
        used = (x, topk_idx, topk_weights, out, combine_wait_recv_cost_stats)
        combined, event, hook = self.runtime.low_latency_combine(
            library.native, used, handle, (use_logfmt, use_fp8, zero_copy, return_recv_hook),
            self._options(None, True, False) if async_finish else ())
        if out is not None:
            combined = out
        return (combined,
                self._end(event, (used, handle), (combined,)) if async_finish else no_event(),
                None if hook is None else partial(_receive, hook, (used, handle)))

    def get_next_low_latency_combine_buffer(self, handle):
        """[L, R * M, H] bfloat16, for the experts to write to: pass it to the next
        low_latency_combine, with `zero_copy`. Valid until `destroy`."""
        library = library_of(handle[0], "handle[0]")
        return self.runtime.get_next_low_latency_combine_buffer(library.native, handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """Checks that calls of this shape fit; nothing needs to be cleaned between calls. With
        `enable_shrink` it is collective, and ranks that do not come are masked."""
        self.runtime.clean_low_latency_buffer(num_max_dispatch_tokens_per_rank, hidden,
                                              num_experts)

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """With `enable_shrink`: whether calls leave a rank out, as sender and as receiver.
        Local."""
        self.runtime.low_latency_update_mask_buffer(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status):
        """Fills `mask_status`, int32 [R] on the Buffer's device: 1 for each rank that is left
        out."""
        library = library_of(mask_status, "mask_status")
        self.runtime.low_latency_query_mask_buffer(library.native, mask_status)

    def low_latency_clean_mask_buffer(self):
        """No rank is left out any more."""
        self.runtime.low_latency_clean_mask_buffer()
