"""What dispatch and combine take and give beyond DeepEP's: counts ahead of the rows, outputs of the
caller's, rows grouped by expert."""

from collections import namedtuple

from ._arrays import library_of


class PreparedDispatch(namedtuple("PreparedDispatch", (
        "handle", "num_recv_tokens", "num_recv_tokens_per_expert_list", "num_experts",
        "expert_alignment", "num_rdma_recv_tokens"))):
    """What `Buffer.prepare_dispatch` found out about a coming dispatch: of use any number of times,
    as long as the routing is that one. Of `handle` two elements (with several nodes four), which
    come with the rows, are None. `num_rdma_recv_tokens`: tokens that this rank passes on inside its
    node, 0 if there is one."""

    __slots__ = ()


class RowGroups(namedtuple("RowGroups", ("group_offsets", "grouped_rows", "recv_rows", "weights"))):
    """How received rows are grouped by local expert, G grouped rows in all, padding included.

    `group_offsets` int32 [L + 1]: local expert e has the grouped rows from element e to e + 1, in
    ascending received row, then zeros up to the alignment; rows from element L on are undefined.
    `grouped_rows` int32 [Nr, K]: the grouped row of each entry of recv_topk_idx, -1 where that is
    -1. `recv_rows` int32 [G]: the received row of each grouped one, -1 for padding. `weights`
    float32 [G], None without topk_weights: the sum of the weights of its entries, 0 for padding.
    """

    __slots__ = ()


class GroupedDispatch(namedtuple("GroupedDispatch", (
        "recv_x", "recv_topk_idx", "recv_topk_weights", "num_recv_tokens_per_expert_list", "handle",
        "event", "grouped_x", "groups"))):
    """What `Buffer.dispatch_grouped` returns: what dispatch does, `grouped_x` [G, H] (a pair if x
    is one) and `groups`, RowGroups."""

    __slots__ = ()


def _pair(x):
    return x if isinstance(x, tuple) else (x, None)


class Extras:
    """Arguments of a dispatch that DeepEP's has not, and what becomes of them."""

    def __init__(self, num_experts, prepared, outputs, group_rows=False, groups=None):
        if prepared is not None and not isinstance(prepared, PreparedDispatch):
            raise TypeError(f"prepared is {type(prepared)}, must be the PreparedDispatch that "
                            "prepare_dispatch returned")
        self.num_experts, self.prepared = num_experts or 0, prepared
        recv_x, recv_topk_idx, recv_topk_weights, grouped_x = outputs
        self._outputs = (*_pair(recv_x), recv_topk_idx, recv_topk_weights, *_pair(grouped_x))
        self._group_rows, self._groups = group_rows, groups

    def values(self):
        return self.num_experts, self.prepared, self._outputs, self._group_rows, self._groups

    def used(self):
        """What an asynchronous call uses of the caller's."""
        return self._outputs, self.prepared, self._groups

    def received(self, result, rows):
        """`result` with the outputs that the caller brought in their places."""
        recv_x, ids, weights, *rest = result
        if isinstance(recv_x, tuple):
            recv_x = (self._brought(0, recv_x[0], rows), self._brought(1, recv_x[1], rows))
        else:
            recv_x = self._brought(0, recv_x, rows)
        return recv_x, self._brought(2, ids, rows), self._brought(3, weights, rows), *rest

    def grouped(self, more):
        """(grouped_x or a pair, groups), if asked for."""
        if not self._group_rows:
            return ()
        _, rows, grouped, scales, parts = more
        grouped, scales = self._brought(4, grouped, rows), self._brought(5, scales, rows)
        return (grouped if scales is None else (grouped, scales),
                self._groups if parts is None else RowGroups(*parts))

    def _brought(self, index, made, rows):
        output = self._outputs[index]
        if output is None:
            return made
        return output if len(output) == rows else output[:rows]


class Rows:
    """Methods of Buffer."""

    def prepare_dispatch(self, x, num_tokens_per_rank=None, is_token_in_rank=None,
                         num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
                         expert_alignment=1, config=None, previous_event=None, *,
                         num_experts=None):
        """The counts of a coming dispatch, so that the caller can make its own outputs: takes the
        arguments of one without `handle`, moves nothing and waits for the counts. Collective.

        Returns a PreparedDispatch, to be given to `dispatch` or `dispatch_grouped` as `prepared`.
        """
        x, x_scales = _pair(x)
        library = library_of(x, "x")
        return PreparedDispatch(*self.runtime.prepare_dispatch(
            library.native, (x, x_scales), (topk_idx, topk_weights),
            (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank), num_experts or 0,
            expert_alignment, self._config_values(config, True),
            self._options(previous_event, False, False)))

    def dispatch_grouped(self, x, handle=None, groups=None, num_tokens_per_rank=None,
                         is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None,
                         topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None,
                         previous_event=None, async_finish=False, allocate_on_comm_stream=False, *,
                         dispatch_wait_recv_cost_stats=None, num_experts=None, prepared=None,
                         recv_x=None, recv_topk_idx=None, recv_topk_weights=None, grouped_x=None):
        """A dispatch whose result has the rows once more, grouped by local expert, each group
        padded to `expert_alignment`. Needs `topk_idx`, or `handle` and `groups` of an earlier one.
        Collective.

        `grouped_x`: an output of the caller's, as `recv_x` is of dispatch, and written directly;
        with `num_worst_tokens` its rows say how many grouped rows there may be.

        Returns a GroupedDispatch. combine takes rows that are grouped so with its `groups`.
        """
        extras = Extras(num_experts, prepared, (recv_x, recv_topk_idx, recv_topk_weights,
                                                grouped_x), True, groups)
        return GroupedDispatch(*self._dispatch(
            x, handle, (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank),
            (topk_idx, topk_weights), (expert_alignment, num_worst_tokens), config,
            dispatch_wait_recv_cost_stats,
            (previous_event, async_finish, allocate_on_comm_stream), extras))
