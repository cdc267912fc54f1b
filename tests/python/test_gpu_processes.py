"""Processes of GPUs as users start and end them."""

import re
import time

import pytest
import torch
import torch.distributed as dist

import deep_ep
import routing
import test_low_latency
from deep_ep.utils.envs import init_dist
from ranks import TIMEOUT, free_port, num_gpus, run_program
from routing import (Expected, calc_diff, dispatch_arguments, kept_weights, layout_of, make_inputs,
                     same, weighted)
from test_low_latency import HIDDEN, LOCAL, MAX_TOKENS

pytestmark = pytest.mark.gpu


def _over_nccl(local_rank, size):
    """All modes on a Buffer of an NCCL group, while new tensors are bfloat16 and on the GPU."""
    routing.DEVICE = "cuda"
    torch.cuda.set_device(local_rank)
    everyone = make_inputs(size, hidden=256, experts=2 * size)
    few = make_inputs(size, 9, hidden=HIDDEN, topk=4, experts=LOCAL * size)
    rank, size, group = init_dist(local_rank, size)
    plain = torch.ones(1)
    assert dist.get_backend(group) == "nccl" and (group.rank(), group.size()) == (rank, size)
    assert plain.dtype == torch.bfloat16 and plain.get_device() == local_rank

    one, other = everyone[rank], few[rank]
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, size, other.experts)
    buffer = deep_ep.Buffer(group, deep_ep.Config().get_nvl_buffer_size_hint(512, size), hint,
                            low_latency_mode=True, num_qps_per_rank=LOCAL)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(one.topk_idx, one.experts)
    recv_x, ids, weights, counts, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    combined, combined_weights, _ = buffer.combine(recv_x, handle, weights)
    rows, count, few_handle, _, hook = buffer.low_latency_dispatch(
        other.x, other.topk_idx, MAX_TOKENS, other.experts, use_fp8=False, return_recv_hook=True)
    hook()
    home = buffer.low_latency_combine(rows, other.topk_idx, other.topk_weights, few_handle)[0]

    torch.set_default_dtype(torch.float32)  # what checks the results makes tensors too
    torch.set_default_device(None)
    expected = Expected(everyone, rank)
    assert all(same(*pair) for pair in zip((per_rank, per_expert, in_rank), layout_of(one, size)))
    assert counts == expected.per_expert and len(recv_x) == expected.rows
    expected.check(recv_x, ids, weights, handle)
    assert same(combined.float(), one.x.float() * in_rank.sum(1, keepdim=True))
    assert same(combined_weights, kept_weights(one))
    test_low_latency._check_rows(few, rank, rows, count, few_handle, exact=True)
    assert calc_diff(home, weighted(other)) < 1e-5
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


def test_a_group_of_nccl_serves_as_test_programs_for_deepep_make_it(gpu_ranks, monkeypatch):
    if gpu_ranks.run(1, num_gpus)[0] < 2:
        pytest.skip("NCCL takes one rank a GPU: needs two GPUs")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("MASTER_PORT", str(free_port())), ("NCCL_SOCKET_IFNAME", "lo"),
                        ("NCCL_NVLS_ENABLE", "0")):  # multicast is not what is tested
        monkeypatch.setenv(name, value)
    running = torch.multiprocessing.spawn(_over_nccl, (2,), 2, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not running.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, "the processes do not end"
    finally:
        for process in running.processes:
            process.kill()


PROGRAM = """
import sys
import torch
import deep_ep

rank, port = map(int, sys.argv[1:])
torch.cuda.set_device(rank % torch.cuda.device_count())
group = deep_ep.Group.tcp(rank, 2, port=port)
hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(4, 128, 2, 2)
buffer = deep_ep.Buffer(group, 16 << 20, hint, low_latency_mode=True)
x = torch.full((4, 128), rank + 1, dtype=torch.bfloat16, device="cuda")
ids = torch.tensor([[0], [1], [0], [1]], device="cuda")
weights = torch.ones((4, 1), device="cuda")
per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2)

def exchange(**when):
    got = buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                          num_tokens_per_expert=per_expert, topk_idx=ids, topk_weights=weights,
                          num_worst_tokens=8, **when)
    return got, buffer.combine(got[0], got[4], **when)

alive = [exchange(), buffer.capture()]
torch.cuda.synchronize()
group.all_gather_bytes(b"here")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured, (combined, _, _) = exchange()
for _ in range(3):
    combined.zero_()
    graph.replay()
    assert torch.equal(combined, x)
torch.cuda._sleep(20_000_000)  # what follows is under way when the program ends
alive.append(exchange(async_finish=True))
alive.append(buffer.low_latency_dispatch(x, ids, 4, 2, return_recv_hook=True))
print("end")
"""


def test_processes_may_end_with_everything_alive(gpu_ranks, tmp_path):
    """A Buffer, results, handles, events, a hook that did not run, a graph, calls under way."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for said, complained in run_program(program):
        assert said == "end\n"
        assert not re.search("error|exception|traceback|terminate|abort|leak|segmentation|dumped",
                             complained, re.IGNORECASE), complained
