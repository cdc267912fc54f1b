"""Low-latency calls that leave ranks out, as they are told or because these do not come."""

import time

import pytest
import torch

import routing
from routing import calc_diff, make_inputs, over_nodes
from test_low_latency import HIDDEN, LOCAL, MAX_TOKENS, buffer_of, inputs_of, rows_of


def _masks(group):
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group, enable_shrink=True)
    status = torch.full((size,), -1, dtype=torch.int32, device=routing.DEVICE)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * size
    other = (rank + 1) % size
    buffer.low_latency_update_mask_buffer(other, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(index == other) for index in range(size)]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * size
    torch.distributed.barrier(group)
    buffer.destroy()


def test_ranks_can_be_left_out(ranks):
    ranks.run(2, _masks)


def _one_leaves(group, at):
    """A rank that does not come to a call is left out from then on, and shows in the mask."""
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group, enable_shrink=True, timeout=2)
    one = inputs_of(group, tokens=[9] * size)[rank]
    for phase in ("dispatch", "combine", "clean"):
        if rank == 1 and phase == at:
            break
        if phase == "dispatch":
            recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
                one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=False)
        elif phase == "combine":
            combined = buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle)[0]
        else:
            buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, one.experts)
    if rank != 1:
        status = torch.full((size,), -1, dtype=torch.int32, device=routing.DEVICE)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 1, 0]
        here = (one.topk_idx >= 0) & ((at == "clean") | (one.topk_idx // LOCAL != 1))
        kept = torch.where(here, one.topk_weights, 0.0).sum(1, keepdim=True)
        assert calc_diff(combined, one.x.float() * kept) < 1e-5
    torch.distributed.barrier(group)
    buffer.destroy()


@pytest.mark.parametrize("at", ["dispatch", "combine", "clean"])
def test_who_does_not_come_is_left_out(ranks, at):
    ranks.run(3, _one_leaves, at)


def test_a_rank_of_another_node_that_does_not_clean_is_left_out(cpu_node_ranks):
    cpu_node_ranks.run(3, over_nodes, 1, _one_leaves, "clean")


def _left_out_but_calls(group, topk):
    """Rank 0, which rank 1 has left out, does not know: its counts and rows come all the same, and
    are nowhere among those of rank 1. For rank 0 it is rank 1 that does not come."""
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group, enable_shrink=True, timeout=1)
    one = make_inputs(size, [9] * size, hidden=HIDDEN, topk=topk, experts=LOCAL * size)[rank]
    if rank == 1:
        buffer.low_latency_update_mask_buffer(0, True)
    for again in range(3):
        torch.distributed.barrier(group)
        if rank == 1:
            time.sleep(0.1)  # behind what rank 0 sends
        recv_x, count, handle, _, _ = buffer.low_latency_dispatch(
            one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=False)
        for expert in range(LOCAL):
            own = [token for _, token in rows_of([one], rank * LOCAL + expert)]
            assert count[expert] == len(own)
            assert torch.equal(recv_x[expert, :len(own)], one.x[own]), (again, expert)
        combined = buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle)[0]
        here = (one.topk_idx >= 0) & (one.topk_idx // LOCAL == rank)
        kept = torch.where(here, one.topk_weights, 0.0).sum(1, keepdim=True)
        assert calc_diff(combined, one.x.float() * kept) < 1e-5
    torch.distributed.barrier(group)
    buffer.destroy()


@pytest.mark.parametrize("topk", [4, 8])
def test_who_is_left_out_may_go_on_calling(ranks, topk):
    ranks.run(2, _left_out_but_calls, topk)
