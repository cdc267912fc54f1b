"""Inputs that every rank can make of every rank, and what dispatch must give for them: loops over a
global view, written from the interface's description; and graphs of calls."""

import os
import threading

import torch

DEVICE = "cpu"  # of the inputs; ranks on GPUs set theirs


def same(found, expected):
    """Equal in type, shape and every value, wherever they lie."""
    return found.dtype == expected.dtype and torch.equal(found.cpu(), expected.cpu())


class Inputs:
    """Of one rank. Values are small integers, so that sums are exact in bfloat16."""

    def __init__(self, rank, tokens=17, hidden=32, topk=3, experts=8, seed=0, drop=0.2,
                 dtype=torch.bfloat16):
        random = torch.Generator().manual_seed(1000 * seed + rank)
        self.x = torch.randint(-4, 5, (tokens, hidden), generator=random).to(dtype)
        self.x[:, 0] = rank + 1  # never all zero, and different for each rank
        self.topk_idx = torch.randint(0, experts, (tokens, topk), generator=random)
        self.topk_idx[torch.rand((tokens, topk), generator=random) < drop] = -1
        self.topk_weights = torch.randint(1, 9, (tokens, topk), generator=random) / 8.0
        self.experts = experts
        for name in ("x", "topk_idx", "topk_weights"):
            setattr(self, name, getattr(self, name).to(DEVICE))


def make_inputs(size, tokens=17, **options):
    """`tokens`: of all ranks, or a list with a number for each."""
    counts = tokens if isinstance(tokens, (list, tuple)) else [tokens] * size
    return [Inputs(rank, counts[rank], **options) for rank in range(size)]


def layout_of(one, size):
    """(tokens per rank, tokens per expert, is token in rank) of a rank's inputs."""
    local = one.experts // size
    in_rank = torch.zeros((one.x.shape[0], size), dtype=torch.bool)
    per_expert = torch.zeros(one.experts, dtype=torch.int32)
    for token, experts in enumerate(one.topk_idx.tolist()):
        for expert in experts:
            if expert >= 0:
                in_rank[token, expert // local] = True
                per_expert[expert] += 1
    return in_rank.sum(0).int().to(DEVICE), per_expert.to(DEVICE), in_rank.to(DEVICE)


def kept_weights(one):
    """[N, K] weights of the entries that name an expert, 0 for the others."""
    return torch.where(one.topk_idx >= 0, one.topk_weights, 0.0)


def weighted(one):
    """[N, H] float32: what comes home of x by low latency if experts give back what they get."""
    return one.x.float() * kept_weights(one).sum(1, keepdim=True)


def over_nodes(group, ranks_per_node, function, *arguments):
    """function(group, *arguments), with Buffers whose ranks pose as nodes of so many."""
    os.environ["DEEP_EP_RANKS_PER_NODE"] = str(ranks_per_node)
    try:
        return function(group, *arguments)
    finally:
        del os.environ["DEEP_EP_RANKS_PER_NODE"]


def clear_on_a_thread(tensors):
    """What only this list holds dies on a thread that nobody has seen."""
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()


def num_rows_of(handle):
    """Rows that a handle has room for, as slime reads it."""
    return (handle[3] if len(handle) == 6 else handle[7]).shape[0]


def source_tokens_of(handle):
    """The token at its source of each received row."""
    return handle[3] if len(handle) == 6 else handle[7].view(torch.int32)[:, 1]


def rows_by_source(handle, rank):
    """Rows received from ranks 0..i."""
    return (handle[0][:, rank] if len(handle) == 6 else handle[-4]).tolist()


def captured(group, step):
    """A graph of step(), and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.distributed.barrier(group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


class Expected:
    """What `rank` receives, in (source rank, token) order."""

    def __init__(self, everyone, rank):
        size, local = len(everyone), everyone[0].experts // len(everyone)
        self.x, self.topk_idx, self.topk_weights, self.src_idx = [], [], [], []
        self.from_rank = []
        for one in everyone:
            before = len(self.x)
            in_rank = layout_of(one, size)[2]
            for token in range(one.x.shape[0]):
                if not in_rank[token, rank]:
                    continue
                ids, weights = one.topk_idx[token], one.topk_weights[token]
                mine = (ids >= 0) & (ids // local == rank)
                self.x.append(one.x[token])
                self.topk_idx.append(torch.where(mine, ids - rank * local, -1))
                self.topk_weights.append(torch.where(mine, weights, 0.0))
                self.src_idx.append(token)
            self.from_rank.append(len(self.x) - before)
        self.rows = len(self.x)
        found = torch.stack(self.topk_idx) if self.rows else torch.empty((0, 1))
        self.per_expert = [int((found == expert).sum()) for expert in range(local)]

    def check(self, recv_x, recv_topk_idx, recv_topk_weights, handle):
        assert recv_x.shape[0] >= self.rows
        assert source_tokens_of(handle)[:self.rows].tolist() == self.src_idx
        for row in range(self.rows):
            assert same(recv_x[row], self.x[row]), f"row {row}"
            assert same(recv_topk_idx[row], self.topk_idx[row]), f"row {row}"
            assert same(recv_topk_weights[row], self.topk_weights[row]), f"row {row}"


def dispatch_arguments(buffer, one, **options):
    """The keywords of a dispatch of a rank's inputs, with the layout that the Buffer finds."""
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(one.topk_idx,
                                                                            one.experts)
    return dict(x=one.x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=one.topk_idx,
                topk_weights=one.topk_weights, **options)


def calc_diff(x, y):
    """The measure of DeepEP's tests: 0 for equal, about the squared relative error."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())
