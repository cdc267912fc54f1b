"""What calls waited for which rank is added up in the caller's array, in every form of the calls,
on one node and over several."""

import time

import pytest
import torch
import torch.distributed as dist

import deep_ep
import routing
from routing import dispatch_arguments, make_inputs, over_nodes

BEFORE, LATE = 1 << 40, 0.05  # what the arrays hold already; seconds
LEAST = 10_000_000            # ns, or cycles of more than a GHz


def _late(group, call):
    """call(waits) of ranks of which the last is late, twice on one array: what it grew by."""
    waits = torch.full((group.size(),), BEFORE, dtype=torch.int64, device=routing.DEVICE)
    grown, result = [], None
    for _ in range(2):
        before = waits.clone()
        dist.barrier(group)
        if group.rank() == group.size() - 1:
            time.sleep(LATE)
        result = call(waits)
        grown.append((waits - before).tolist())
    return grown, result


def _check(group, grown, named=None):
    """Each time anew all waited for the last rank, or for `named`; nobody as long for itself."""
    late = group.size() - 1
    for one in grown:
        assert min(one) >= 0, grown
        if group.rank() != late:
            waited = one[named or late]
            assert waited > LEAST and one[group.rank()] < waited, grown


def _wait(event):
    if event.event is not None:
        event.current_stream_wait()


def _high_throughput(group, named=(None,) * 3):
    """All tokens go to all ranks, so that every rank has to wait for every other."""
    rank, size = group.rank(), group.size()
    named = named[rank] if rank < size - 1 else None
    buffer = deep_ep.Buffer(group, 1 << 20, 1 << 22)
    one = make_inputs(size, experts=size, topk=size)[rank]
    one.topk_idx[:] = torch.arange(size)
    arguments = dispatch_arguments(buffer, one)
    got = buffer.dispatch(**arguments)
    topk = {"topk_idx": one.topk_idx, "topk_weights": one.topk_weights}
    ahead = buffer.prepare_dispatch(one.x, **topk, num_experts=size)

    def dispatch(waits):
        _wait(buffer.dispatch(**given, **when, dispatch_wait_recv_cost_stats=waits)[5])

    def combine(waits):
        _wait(buffer.combine(got[0], got[4], **when, combine_wait_recv_cost_stats=waits)[2])

    for asynchronous in (False, True):
        when = {"async_finish": asynchronous}
        for given in (arguments, {**arguments, "num_worst_tokens": 17 * size},
                      {"x": one.x, "handle": got[4]}, {"x": one.x, "prepared": ahead, **topk}):
            _check(group, _late(group, dispatch)[0], named)
        _check(group, _late(group, combine)[0], named)
    buffer.destroy()


def _low_latency(group):
    rank, size = group.rank(), group.size()
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(17, 128, size, size)
    buffer = deep_ep.Buffer(group, 0, hint, low_latency_mode=True)
    one = make_inputs(size, hidden=128, experts=size, topk=size)[rank]
    one.topk_idx[:] = torch.arange(size)
    for hook in (False, True):
        when = {"async_finish": not hook, "return_recv_hook": hook}

        def dispatch(waits):
            got = buffer.low_latency_dispatch(one.x, one.topk_idx, 17, one.experts, use_fp8=False,
                                              dispatch_wait_recv_cost_stats=waits, **when)
            got[4]() if hook else got[3].current_stream_wait()
            return got

        def combine(waits):
            got = buffer.low_latency_combine(rows, one.topk_idx, one.topk_weights, handle,
                                             combine_wait_recv_cost_stats=waits, **when)
            got[2]() if hook else got[1].current_stream_wait()

        grown, (rows, _, handle, *_) = _late(group, dispatch)
        _check(group, grown)
        _check(group, _late(group, combine)[0])
    buffer.destroy()


@pytest.mark.parametrize("calls", [_high_throughput, _low_latency])
def test_every_form_of_a_call_adds_up_waits(cpu_ranks, calls):
    cpu_ranks.run(3, calls)


def test_waits_for_ranks_of_other_nodes_are_added_up(cpu_node_ranks):
    cpu_node_ranks.run(4, over_nodes, 2, _low_latency)


def test_who_passes_rows_on_stands_for_the_ranks_of_other_nodes(cpu_node_ranks):
    """Of nodes {0, 1} and {2, 3}: rank 3's rows come to rank 0 by rank 1."""
    cpu_node_ranks.run(4, over_nodes, 2, _high_throughput, (1, 3, 3))
