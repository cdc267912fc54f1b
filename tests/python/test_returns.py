"""What calls return, by golden descriptions: structure, types and shapes as DeepEP's callers take
them apart."""

from pathlib import Path

import torch

import deep_ep
import routing
from routing import dispatch_arguments, layout_of, make_inputs, over_nodes

GOLDEN = dict(line.split(": ", 1) for line in
              Path(__file__).with_name("golden_returns.txt").read_text().splitlines())

# No two lengths are alike, so that each has one name.
TOKENS, HIDDEN, TOPK, EXPERTS, RANKS, MOST, WORST = 13, 768, 3, 36, 4, 17, 97
NODES = 2  # of as many ranks each, so that G is these too


def described(value, names):
    if isinstance(value, torch.Tensor):
        shape = ", ".join(names[length] for length in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, tuple):
        return f"({', '.join(described(one, names) for one in value)})"
    if isinstance(value, list):
        assert all(type(one) is int for one in value)
        return f"list of {names.get(len(value), len(value))}"
    if isinstance(value, int):
        return names[value]
    return "function" if callable(value) else type(value).__name__.replace("NoneType", "None")


def _names(**more):
    names = {TOKENS: "N", HIDDEN: "H", TOPK: "K", EXPERTS: "E", RANKS: "R", EXPERTS // RANKS: "L",
             HIDDEN // 128: "S", MOST: "M", RANKS * MOST: "RM", WORST: "W", 10: "C",
             16: "16"}
    assert len(names.keys() | set(more.values())) == len(names) + len(more)
    return {**names, **{length: name for name, length in more.items()}}


def _inputs():
    return make_inputs(RANKS, TOKENS, hidden=HIDDEN, topk=TOPK, experts=EXPERTS)


def _high_throughput(group, names):
    """Descriptions of what the calls return; `names` gives those of lengths, of a dispatch."""
    buffer = deep_ep.Buffer(group, 1 << 20, 1 << 24)
    one = _inputs()[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    got = buffer.dispatch(**arguments)
    found = {"get_dispatch_layout": buffer.get_dispatch_layout(one.topk_idx, EXPERTS),
             "dispatch": got}
    scales = torch.ones((TOKENS, HIDDEN // 128), device=routing.DEVICE)
    quantised = (one.x.to(torch.float8_e4m3fn), scales)
    found["dispatch FP8"] = buffer.dispatch(**{**arguments, "x": quantised})
    found["dispatch num_worst_tokens"] = buffer.dispatch(**arguments, num_worst_tokens=WORST)
    found["dispatch without topk"] = buffer.dispatch(**{**arguments, "topk_idx": None,
                                                        "topk_weights": None})
    found["dispatch with a handle"] = buffer.dispatch(one.x, handle=got[4])
    found["dispatch FP8 with a handle"] = buffer.dispatch(quantised, handle=got[4])
    found["combine"] = buffer.combine(got[0], got[4], got[2])
    found["combine without weights"] = buffer.combine(got[0], got[4])
    buffer.destroy()
    return {name: described(value, names(got)) for name, value in found.items()}


def _returns(group):
    return _high_throughput(group, lambda got: _names(Nr=got[0].shape[0]))


def _returns_over_nodes(group):
    """T: tokens that come to this node by this rank, of the ranks of its index on all nodes."""
    node, index = divmod(group.rank(), RANKS // NODES)
    passed_on = 0
    for one in _inputs()[index::RANKS // NODES]:
        in_rank = layout_of(one, RANKS)[2]
        passed_on += int(in_rank[:, node * RANKS // NODES:][:, :RANKS // NODES].any(1).sum())
    found = _high_throughput(group, lambda got: _names(Nr=got[0].shape[0], G=NODES, T=passed_on))
    return {f"internode {name}": text for name, text in found.items()}


def _low_latency_returns(group):
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MOST, HIDDEN, RANKS, EXPERTS)
    buffer = deep_ep.Buffer(group, 0, hint, low_latency_mode=True)
    one = _inputs()[group.rank()]
    found = {}
    call = (one.x, one.topk_idx, MOST, EXPERTS)
    found["low_latency_dispatch"] = buffer.low_latency_dispatch(*call)
    found["low_latency_dispatch UE8M0"] = buffer.low_latency_dispatch(*call, round_scale=True,
                                                                      use_ue8m0=True)
    got = buffer.low_latency_dispatch(*call, use_fp8=False, return_recv_hook=True)
    found["low_latency_dispatch BF16, hook"] = got
    got[4]()
    back = (got[0], one.topk_idx, one.topk_weights, got[2])
    found["get_next_low_latency_combine_buffer"] = (
        buffer.get_next_low_latency_combine_buffer(got[2]))
    found["low_latency_combine"] = buffer.low_latency_combine(*back)
    sums = buffer.low_latency_combine(*back, return_recv_hook=True)
    found["low_latency_combine, hook"] = sums
    sums[2]()
    buffer.destroy()
    return {name: described(value, _names(U=2)) for name, value in found.items()}


def _compare(everyone):
    for found in everyone:
        for name, text in found.items():
            assert text == GOLDEN[name], name


def test_returns_are_those_of_deep_ep(ranks):
    _compare(ranks.run(RANKS, _returns))


def test_low_latency_returns_are_those_of_deep_ep(ranks):
    _compare(ranks.run(RANKS, _low_latency_returns))


def test_returns_over_nodes_are_those_of_deep_ep(node_ranks):
    _compare(node_ranks.run(RANKS, over_nodes, RANKS // NODES, _returns_over_nodes))


def test_low_latency_returns_over_nodes_are_those_of_one(node_ranks):
    _compare(node_ranks.run(RANKS, over_nodes, RANKS // NODES, _low_latency_returns))
