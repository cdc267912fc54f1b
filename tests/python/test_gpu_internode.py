"""What only GPUs have, between nodes that their ranks pose as: streams, graphs, puts in place of
mapped memory, and what NVSHMEM cannot do."""

import os

import pytest
import torch

import deep_ep
import test_gpu
import test_gpu_low_latency
import test_gpu_streams
import test_internode
import test_intranode
import test_low_latency
import test_rows
from ranks import Ranks, num_gpus, run_without_library
from routing import dispatch_arguments, over_nodes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size, ranks_per_node", [(2, 1), (4, 2)])
@pytest.mark.parametrize("case", [test_gpu._graph, test_gpu._grouped_graph,
                                  test_low_latency._graph])
def test_calls_are_captured_and_replayed(gpu_node_ranks, size, ranks_per_node, case):
    gpu_node_ranks.run(size, over_nodes, ranks_per_node, case)


@pytest.mark.parametrize("case", [
    test_gpu._results_are_torchs, test_gpu._side_stream_reads, test_gpu._late_compute,
    test_gpu._dropped_in_flight, test_gpu._live_after_destroy, test_gpu._current_stream,
    test_gpu_low_latency._low_latency_on_a_side_stream, test_gpu_streams._behind_an_event,
    test_gpu_streams._low_latency_between_streams,
    test_gpu_streams._first_calls_beside_a_kernel])
def test_streams_and_memory_are_as_on_one_node(gpu_node_ranks, case):
    gpu_node_ranks.run(2, over_nodes, 1, case)


@pytest.mark.parametrize("size, ranks_per_node", [(2, 1), (4, 2)])
def test_profilers_find_one_kernel_of_each_name(gpu_node_ranks, size, ranks_per_node):
    gpu_node_ranks.run(size, over_nodes, ranks_per_node, test_gpu._profiled, 1)


def test_profilers_find_both_phases_of_low_latency_calls(gpu_node_ranks):
    gpu_node_ranks.run(2, over_nodes, 1, test_gpu_low_latency._profiled_hooks)


def _memory_stays(group):
    buffer = test_gpu._buffer(group)
    one = test_gpu._inputs(group, tokens=8)
    arguments = dispatch_arguments(buffer, one)

    def step():
        got = buffer.dispatch(**arguments)
        buffer.dispatch(one.x, handle=got[4])
        buffer.combine(got[0], got[4], got[2])

    for _ in range(50):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved(), buffer.runtime.mapped_bytes()
    for _ in range(700):
        step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_reserved(), buffer.runtime.mapped_bytes()) == before
    buffer.destroy()


def test_memory_does_not_grow(gpu_node_ranks):
    gpu_node_ranks.run(2, over_nodes, 1, _memory_stays)


def _puts_only(group, ranks_per_node, function, *arguments):
    os.environ["DEEP_EP_NVSHMEM_PUTS_ONLY"] = "1"
    try:
        return over_nodes(group, ranks_per_node, function, *arguments)
    finally:
        del os.environ["DEEP_EP_NVSHMEM_PUTS_ONLY"]


@pytest.mark.parametrize("size, ranks_per_node", [(2, 1), (4, 2)])
@pytest.mark.parametrize("case, arguments", [
    (test_intranode._forms, []), (test_rows._grouped, [{}]), (test_gpu._graph, []),
    (test_low_latency._round_trips, []), (test_low_latency._graph, [])],
    ids=lambda value: getattr(value, "__name__", ""))
def test_puts_give_what_mapped_memory_does(gpu_node_ranks, size, ranks_per_node, case, arguments):
    gpu_node_ranks.run(size, _puts_only, ranks_per_node, case, *arguments)


def _other_ranks(group):
    with pytest.raises(deep_ep.Error, match="joined once by a process") as caught:
        test_internode.buffer_of(group)
    return caught.value.code


def test_a_process_is_of_one_world(gpu_node_ranks):
    """All ranks have a Buffer over nodes, so two of them cannot have one of their own; on one node
    they can."""
    four = gpu_node_ranks.of(4)
    four.run(4, over_nodes, 2, test_internode._paths_by_name)
    assert four.run(2, over_nodes, 1, _other_ranks) == ["unsupported"] * 2
    four.run(2, test_intranode._bias)
    four.run(4, over_nodes, 2, test_internode._paths_by_name)


def _unevenly(group):
    torch.cuda.set_device(min(group.rank(), 1))
    with pytest.raises(deep_ep.Error, match="needs as many on each") as caught:
        test_internode.buffer_of(group)
    return caught.value.code


def test_ranks_that_share_gpus_unevenly_are_refused(gpu_node_ranks):
    if gpu_node_ranks.of(2).run(1, num_gpus)[0] < 2:
        pytest.skip("needs two GPUs")
    three = Ranks("cuda", 3)
    try:
        assert three.run(3, over_nodes, 1, _unevenly) == ["unsupported"] * 3
    finally:
        three.stop()


PROGRAM = """
import sys
import torch
import deep_ep

rank, port = map(int, sys.argv[1:])
torch.cuda.set_device(rank % torch.cuda.device_count())
try:
    deep_ep.Buffer(deep_ep.Group.tcp(rank, 2, port=port))
except deep_ep.Error as error:
    print(error.code, error)
"""


def test_a_package_without_the_part_for_nvshmem_says_how_to_get_it(gpu_node_ranks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for answer in run_without_library(program, "libdeep_ep_nvshmem.so", LD_LIBRARY_PATH=""):
        assert answer.startswith("unsupported") and "libdeep_ep_nvshmem.so" in answer, answer
        assert "pip install nvidia-nvshmem-cu13" in answer, answer
