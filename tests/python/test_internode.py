"""Several nodes, which ranks of this machine pose as: what arrives, what crosses the network, what
comes home, and that callers meet the same interface."""

import pytest
import torch

import deep_ep
import routing
import test_callers
import test_errors
import test_intranode
import test_low_latency
import test_low_latency_masks
import test_nn
import test_rows
from ranks import run_without_library
from routing import (Expected, dispatch_arguments, kept_weights, layout_of, make_inputs,
                     num_rows_of, over_nodes, rows_by_source, same)

NODES = [(2, 1), (4, 2), (4, 1)]  # ranks, ranks a node


def buffer_of(group, hidden_bytes=512, **options):
    config, size = deep_ep.Config(), group.size()
    return deep_ep.Buffer(group, config.get_nvl_buffer_size_hint(hidden_bytes, size),
                          config.get_rdma_buffer_size_hint(hidden_bytes, size), **options)


def tokens_by_node(one, size, ranks_per_node):
    """bool [tokens, nodes]"""
    return layout_of(one, size)[2].unflatten(1, (-1, ranks_per_node)).any(2)


def _round_trip(group, ranks_per_node, tokens, options):
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group)
    everyone = make_inputs(size, tokens, experts=2 * size, **options)
    one, expected = everyone[rank], Expected(everyone, rank)
    arguments = dispatch_arguments(buffer, one)
    by_node = tokens_by_node(one, size, ranks_per_node)
    assert same(arguments["num_tokens_per_rdma_rank"], by_node.sum(0).int())
    before = buffer.runtime.network_counts()["rows"]
    recv_x, ids, weights, counts, handle, event = buffer.dispatch(**arguments)
    crossed = buffer.runtime.network_counts()["rows"] - before
    away = [node for node in range(size // ranks_per_node) if node != rank // ranks_per_node]
    assert crossed == int(by_node[:, away].sum())  # once for each other node
    assert event.event is None and counts == expected.per_expert
    expected.check(recv_x, ids, weights, handle)
    assert type(handle) is tuple and len(handle) == 10
    assert all(isinstance(part, torch.Tensor) for part in handle)
    assert num_rows_of(handle) == expected.rows
    by_source = [0, *rows_by_source(handle, rank)]
    assert [after - at for at, after in zip(by_source, by_source[1:])] == expected.from_rank
    assert handle[0] is arguments["is_token_in_rank"]
    combined, combined_weights, _ = buffer.combine(recv_x, handle, weights)
    assert same(combined.float(), one.x.float() * handle[0].sum(1, keepdim=True))
    assert same(combined_weights, kept_weights(one))
    buffer.destroy()


@pytest.mark.parametrize("ranks_per_node, tokens, options", [
    (1, [0, 13], {}),
    (2, 17, {}),
    (2, [7, 0, 0, 1], {"topk": 1}),
    (1, 33, {"topk": 9, "drop": 0.0}),            # more than there are experts: duplicates
    (2, 6, {"drop": 1.0}),                        # nobody wants any token
    (2, 11, {"hidden": 8}),                       # 16 bytes, what slime sends
    (1, 5, {"hidden": 7176, "dtype": torch.float32}),
], ids=str)
def test_rows_cross_once_a_node_and_come_home_summed(node_ranks, ranks_per_node, tokens, options):
    size = len(tokens) if isinstance(tokens, list) else 4
    node_ranks.run(size, over_nodes, ranks_per_node, _round_trip, ranks_per_node, tokens, options)


def _sums(one, size, ranks_per_node, biases):
    """What combine must give where rank r returns a third of r + 1 times each row, in bfloat16: of
    several nodes each one's sum is rounded, then theirs."""
    in_rank = layout_of(one, size)[2]
    total = torch.zeros_like(one.x, dtype=torch.float32)
    for first in range(0, size, ranks_per_node):
        node = torch.zeros_like(total)
        for rank in range(first, first + ranks_per_node):
            row = (one.x.float() * ((rank + 1) / 3)).bfloat16().float()
            node += torch.where(in_rank[:, rank:rank + 1], row, 0.0)
        total += node if size == ranks_per_node else node.bfloat16().float()
    for bias in biases:
        total += bias.float()
    return total.bfloat16()


def _bitwise(group, ranks_per_node, one_node):
    """Values whose sums have to be rounded; what arrives is the same on one node."""
    rank, size = group.rank(), group.size()
    one = make_inputs(size, 40, hidden=96, experts=2 * size, topk=4)[rank]
    random = torch.Generator().manual_seed(rank)
    one.x, *biases = (torch.randn(one.x.shape, generator=random).bfloat16().to(routing.DEVICE)
                      for _ in range(3))
    buffer = buffer_of(group)
    assert (buffer.runtime.get_num_rdma_ranks() == 1) == one_node
    recv_x, ids, weights, counts, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    out = (recv_x.float() * ((rank + 1) / 3)).bfloat16()
    for given in ((), tuple(biases)):
        combined = buffer.combine(out, handle, bias=given or None)[0]
        assert same(combined, _sums(one, size, size if one_node else ranks_per_node, given))
    buffer.destroy()
    return [part.cpu().clone() for part in (recv_x.view(torch.int16), ids, weights)], counts


@pytest.mark.parametrize("size, ranks_per_node", NODES)
def test_results_are_bitwise_those_of_one_node_and_of_the_reference(node_ranks, size,
                                                                    ranks_per_node):
    alone = node_ranks.run(size, _bitwise, ranks_per_node, True)
    nodes = node_ranks.run(size, over_nodes, ranks_per_node, _bitwise, ranks_per_node, False)
    for (arrays, counts), (others, other_counts) in zip(alone, nodes):
        assert counts == other_counts
        assert all(torch.equal(*pair) for pair in zip(arrays, others))


@pytest.mark.parametrize("size, ranks_per_node", NODES)
def test_every_form_of_a_call_gives_the_same(node_ranks, size, ranks_per_node):
    node_ranks.run(size, over_nodes, ranks_per_node, test_intranode._forms)


@pytest.mark.parametrize("what", [test_intranode._opaque, test_intranode._bias,
                                  test_intranode._alignment, test_intranode._gradients_asked,
                                  test_callers._cloned_handles, test_callers._threads])
def test_calls_do_what_they_do_on_one_node(node_ranks, what):
    node_ranks.run(2, over_nodes, 1, what)


@pytest.mark.parametrize("what, arguments", [
    (test_rows._prepared, [[9, 0, 0, 30]]), (test_rows._grouped, [{}]),
    (test_rows._into_an_earlier_result, []), (test_rows._fp8_outputs, []),
    (test_rows._own_layout, [])], ids=lambda value: getattr(value, "__name__", ""))
def test_counts_come_ahead_and_rows_are_grouped_as_on_one_node(node_ranks, what, arguments):
    node_ranks.run(4, over_nodes, 2, what, *arguments)


def test_duplicates_are_grouped_once(node_ranks):
    node_ranks.run(2, over_nodes, 1, test_rows._grouped, {"topk": 7, "drop": 0.0})
    assert "capacity" in node_ranks.run(2, over_nodes, 1, test_rows._grouped_fp8)


def _paths_by_name(group):
    """What DeepEP's own dispatch and combine call."""
    buffer = buffer_of(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    want = buffer.dispatch(**arguments)
    got = buffer.internode_dispatch(**arguments, previous_event=buffer.capture(),
                                    async_finish=True, allocate_on_comm_stream=True)
    got[5].current_stream_wait()
    assert same(got[0], want[0]) and got[3] == want[3]
    again = buffer.internode_dispatch(one.x, got[4])
    assert same(again[0], want[0]) and again[1:5] == (None,) * 4
    home = buffer.internode_combine(got[0], got[4], got[2])
    assert all(same(*pair) for pair in zip(home[:2], buffer.combine(want[0], want[4], want[2])))
    buffer.destroy()


def test_internode_calls_have_the_names_that_they_have_in_deep_ep(node_ranks):
    node_ranks.run(2, over_nodes, 1, _paths_by_name)


def _nodes_of_runtime(group):
    buffer = buffer_of(group)
    runtime = buffer.runtime
    found = (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank(),
             runtime.get_root_rdma_rank(True), runtime.get_root_rdma_rank(False),
             runtime.is_internode_available())
    gpu = torch.cuda.current_device() if routing.DEVICE == "cuda" else -1
    assert runtime.get_local_device_id() == gpu
    buffer.destroy()
    return found, runtime.is_internode_available()


def test_the_runtime_tells_nodes_as_deep_eps_does(node_ranks):
    found = node_ranks.run(4, over_nodes, 2, _nodes_of_runtime)
    assert found == [((2, rank // 2, rank % 2, 0, True), False) for rank in range(4)]
    assert node_ranks.run(2, _nodes_of_runtime)[1][0] == (1, 0, 1, 0, False)


@pytest.mark.parametrize("size, ranks_per_node", NODES)
def test_gradients_are_those_of_one_process(node_ranks, size, ranks_per_node):
    node_ranks.run(size, over_nodes, ranks_per_node, test_nn._gradients)


def test_a_layer_gives_each_expert_the_gradients_of_all_ranks_tokens(node_ranks):
    node_ranks.run(2, over_nodes, 1, test_nn._layer)


def _wrong_handles(group):
    """Refused before anybody is told: the Buffer stays usable."""
    buffer = buffer_of(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    recv_x, _, _, _, handle, _ = buffer.dispatch(**arguments)
    with pytest.raises(TypeError, match="a tuple of 6, must be the tuple of 10 arrays that "
                                        "dispatch of a Buffer of 2 nodes returned"):
        buffer.combine(recv_x, handle[:6])
    with pytest.raises(TypeError, match="handle is <class 'list'>"):
        buffer.dispatch(one.x, list(handle))
    buffer.combine(recv_x, handle)
    buffer.destroy()


def test_handles_of_one_node_are_type_errors(node_ranks):
    node_ranks.run(2, over_nodes, 1, _wrong_handles)


def _changed_handle(group, name, at, value):
    """What is said of a combine for which one array of rank 0's handle has `value` in it."""
    buffer = buffer_of(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    recv_x, _, weights, _, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    buffer.combine(recv_x, handle, weights)
    changed = [part.clone() for part in handle]
    if group.rank() == 0:
        changed[HANDLE.index(name)].view(-1)[at] = value
    torch.distributed.barrier(group)  # nobody is still in the call before

    def combine():
        buffer.combine(recv_x, tuple(changed), weights)
        if routing.DEVICE == "cuda":
            torch.cuda.synchronize()
            buffer.check()

    error = test_errors._error_of(combine)
    buffer.destroy()
    return error.code, str(error)


HANDLE = ("is_token_in_rank", "rdma_channel_prefix_matrix", "gbl_channel_prefix_matrix",
          "recv_rdma_channel_prefix_matrix", "recv_rdma_rank_prefix_sum",
          "recv_gbl_channel_prefix_matrix", "recv_gbl_rank_prefix_sum", "recv_src_meta",
          "send_rdma_head", "send_nvl_head")


@pytest.mark.parametrize("size, ranks_per_node", [(2, 1), (4, 2)])
@pytest.mark.parametrize("name, at, value", [
    ("recv_rdma_rank_prefix_sum", 0, 1), ("recv_rdma_rank_prefix_sum", 0, -1),
    ("recv_rdma_rank_prefix_sum", 0, 1 << 30), ("recv_gbl_rank_prefix_sum", 0, 1),
    ("recv_gbl_rank_prefix_sum", 0, 1 << 30), ("send_rdma_head", 0, 1 << 30),
    ("send_nvl_head", -1, 1 << 30)])  # of a token of another node, whose rank would miss the row
def test_a_handle_that_was_changed_is_refused_and_says_where(node_ranks, size, ranks_per_node,
                                                             name, at, value):
    """GPUs send by it before they have compared it with what other ranks say."""
    (_, told), *others = node_ranks.run(size, over_nodes, ranks_per_node, _changed_handle, name, at,
                                        value)
    assert name in told
    assert {code for code, _ in others} <= {"peer failed", "disagreement", "invalid argument"}


def test_a_rank_that_does_not_come_is_named_on_other_nodes(node_ranks):
    assert node_ranks.run(2, over_nodes, 1, test_errors._late)[0] == ("timeout", [1])


def test_a_refusal_of_one_rank_is_known_on_other_nodes(node_ranks):
    (code, blamed), (own_code, _) = node_ranks.run(2, over_nodes, 1, test_errors._refused_on_one)
    assert (code, blamed, own_code) == ("peer failed", [1], "invalid argument")


def test_too_few_worst_tokens_are_an_error(node_ranks):
    assert "capacity" in node_ranks.run(2, over_nodes, 1, test_errors._too_few_worst_tokens)


def _low_latency_not_asked_for(group):
    buffer = buffer_of(group)
    one = make_inputs(group.size(), hidden=128, experts=2 * group.size())[group.rank()]
    with pytest.raises(deep_ep.Error, match="made with low_latency_mode") as caught:
        buffer.low_latency_dispatch(one.x, one.topk_idx, 17, one.experts)
    assert caught.value.code == "unsupported"
    buffer.dispatch(**dispatch_arguments(buffer, one))  # nobody heard of it
    buffer.destroy()


def test_low_latency_says_that_it_has_to_be_asked_for(node_ranks):
    node_ranks.run(2, over_nodes, 1, _low_latency_not_asked_for)


@pytest.mark.parametrize("ranks, ranks_per_node", NODES)
@pytest.mark.parametrize("case", [test_low_latency._round_trips, test_low_latency._two_live])
def test_low_latency_is_that_of_one_node(node_ranks, ranks, ranks_per_node, case):
    node_ranks.run(ranks, over_nodes, ranks_per_node, case)


@pytest.mark.parametrize("case", [test_low_latency._vllm, test_low_latency._tensorrt_llm,
                                  test_low_latency._sglang, test_low_latency._wires,
                                  test_low_latency_masks._masks, test_low_latency._dropped,
                                  test_low_latency._late_rank])
def test_low_latency_calls_do_what_they_do_on_one_node(node_ranks, case):
    node_ranks.run(2, over_nodes, 1, case)


PROGRAM = """
import sys
sys.modules["torch"] = None
import numpy as np
import deep_ep

rank, port = map(int, sys.argv[1:])
try:
    buffer = deep_ep.Buffer(deep_ep.Group.tcp(rank, 2, port=port))
except deep_ep.Error as error:
    print(error.code, error)
    raise SystemExit
x = np.full((3, 16), rank + 1, np.float32)
got = buffer.dispatch(x, topk_idx=np.array([[0], [1], [0]]), num_experts=2)
assert [part.dtype.name for part in got[4]] == ["bool"] + ["int32"] * 6 + ["uint8"] + ["int32"] * 2
again = buffer.dispatch(x, handle=tuple(part.copy() for part in got[4]))[0]
home = buffer.combine(again, got[4])[0]
assert np.array_equal(got[0], again) and np.array_equal(home, x)
print("from rank", *got[0][:, 0])
"""


def test_the_part_for_networks_is_found_beside_the_package_or_by_the_system(cpu_node_ranks,
                                                                            tmp_path):
    """And a package without it says what is missing, where several nodes ask for it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for answer in run_without_library(program, "libdeep_ep_ucx.so", LD_LIBRARY_PATH=""):
        assert "libdeep_ep_ucx.so" in answer and "libucx0" in answer, answer
    received = ["from rank 1.0 1.0 2.0 2.0", "from rank 1.0 2.0"]
    assert run_without_library(program, "libdeep_ep_ucx.so",
                               LD_LIBRARY_PATH=str(tmp_path / "lib")) == received
