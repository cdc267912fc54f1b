"""What test programs for DeepEP do from beginning to end, written from their description: every
form of a call on one Buffer, their checks, their bounds, and ranks that leave on the way."""

import itertools

import pytest
import torch
import torch.distributed as dist

import deep_ep
import routing
from deep_ep.utils.math import (calc_diff, hash_tensor, inplace_unique, per_token_cast_back,
                                per_token_cast_to_fp8)
from routing import over_nodes, rows_by_source, same

TOKENS, HIDDEN, TOPK, LOCAL = 32, 1024, 4, 3
OFFSET = 128  # rows of rank r are r - OFFSET all over, but for their last 128 values


def _as_there(group, function, *arguments):
    """New tensors are bfloat16 and on the device unless they say more."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(routing.DEVICE)
    try:
        return function(group, *arguments)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def _noise(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _gate(rank, num_experts, seed=0):
    """Distinct experts for each token, as float32 scores say."""
    generator = torch.Generator(routing.DEVICE).manual_seed(1000 * seed + rank)
    scores = _noise((TOKENS, num_experts), generator).abs() + 1
    ids = scores.topk(TOPK, dim=-1, sorted=False)[1].to(deep_ep.topk_idx_t)
    return ids, generator


# -- high throughput


def _check_segments(rows, handle, rank):
    """Rows of one value each, grouped by ascending source rank along what the handle says."""
    assert same(rows.amin(1), rows.amax(1))
    begin = 0
    for source, end in enumerate(rows_by_source(handle, rank)):
        assert (rows[begin:end].int() - source).sum().item() == 0
        begin = end
    assert begin == len(rows)


def _plain(x):
    return per_token_cast_back(*x) if isinstance(x, tuple) else x


def _check_received(got, case, buffer):
    """Returns the rows as bfloat16, and weights of which no entry is 0."""
    rank, arguments, constant, per_rank, per_expert = case
    recv_x, ids, weights, counts, handle, _ = got
    rows = _plain(recv_x)
    assert len(rows) == per_rank[rank]
    assert counts == per_expert.view(buffer.group_size, -1)[rank].tolist()
    if constant:
        _check_segments(rows, handle, rank)
    if ids is None:
        return rows, None
    assert ((ids == -1) | ((ids >= 0) & (ids < LOCAL))).all()
    assert [(ids == expert).sum().item() for expert in range(LOCAL)] == counts
    kept = weights.clone()
    if constant:
        weights[ids == -1] = weights.amax(1, keepdim=True).expand_as(weights)[ids == -1]
        _check_segments(weights, handle, rank)
    worst = buffer.dispatch(**arguments, num_worst_tokens=TOKENS * buffer.group_size)
    worst[5].current_stream_wait() if arguments["async_finish"] else None
    assert worst[3] == [] and len(_plain(worst[0])) == TOKENS * buffer.group_size
    assert same(_plain(worst[0])[:len(rows)], rows) and same(worst[1][:len(rows)], ids)
    assert same(worst[2][:len(rows)], kept) and (worst[1][len(rows):] == -1).all()
    return rows, weights


def _exchange(buffer, config, payload, arguments, case):
    rank, _, constant, *_ = case
    asynchronous = arguments["async_finish"]
    got = buffer.dispatch(**arguments)
    got[5].current_stream_wait() if asynchronous else None
    rows, weights = _check_received(got, case, buffer)
    again = {"x": payload, "handle": got[4], "config": config, "async_finish": asynchronous}
    if "previous_event" in arguments:
        again["previous_event"] = buffer.capture()
    cached = buffer.dispatch(**again, num_worst_tokens=TOKENS)  # of no account
    cached[5].current_stream_wait() if asynchronous else None
    assert same(_plain(cached[0]), rows)
    home = {**again, "x": rows, "topk_weights": weights}
    combined, sums, event = buffer.combine(**home)
    event.current_stream_wait() if asynchronous else None
    num_ranks = arguments["is_token_in_rank"].sum(1, keepdim=True)
    sent = _plain(payload)
    assert calc_diff(combined.float() / num_ranks, sent) < 5e-6
    if weights is not None:  # of all entries, not only of those that name an expert
        sums = sums / num_ranks if constant else sums
        assert calc_diff(sums, arguments["topk_weights"]) < 1e-9


def _high_throughput(group):
    rank, size = group.rank(), group.size()
    config = deep_ep.Config(24, 8, 256, 16, 128)
    buffer = deep_ep.Buffer(group, 1 << 24, config.get_rdma_buffer_size_hint(2 * HIDDEN, size),
                            low_latency_mode=False, num_qps_per_rank=1, explicitly_destroy=True,
                            allow_mnnvl=False)
    ids, generator = _gate(rank, LOCAL * size)
    in_rank = torch.stack([(ids // LOCAL == other).any(1) for other in range(size)], 1)
    layout = buffer.get_dispatch_layout(ids, LOCAL * size)
    rank_ids = ids // LOCAL
    inplace_unique(rank_ids, size)
    mine = torch.stack([(rank_ids == other).sum() for other in range(size)])
    assert torch.allclose(layout[0], mine.int()) and torch.allclose(layout[3], in_rank)
    per_rank, per_expert = mine.cpu(), torch.bincount(ids.view(-1).cpu(), minlength=LOCAL * size)
    assert same(layout[2], per_expert.int())
    for one in (per_rank, per_expert):
        dist.all_reduce(one, group=group)

    constant = torch.full((TOKENS, HIDDEN), rank, dtype=torch.bfloat16)
    noise = _noise((TOKENS, HIDDEN), generator).bfloat16()
    values, scales = per_token_cast_to_fp8(constant)
    constant_weights = torch.full((TOKENS, TOPK), rank, dtype=torch.float32)
    weights = _noise((TOKENS, TOPK), generator)
    for previous, asynchronous, payload, with_topk in itertools.product(
            (False, True), (False, True), (noise, constant, (values, scales.T.contiguous().T)),
            (False, True)):
        arguments = {"x": payload, "num_tokens_per_rank": layout[0], "is_token_in_rank": layout[3],
                     "num_tokens_per_expert": layout[2], "config": config,
                     "async_finish": asynchronous}
        if with_topk:
            arguments |= {"topk_idx": ids,
                          "topk_weights": weights if payload is noise else constant_weights}
        if previous:
            arguments["previous_event"] = buffer.capture()
        _exchange(buffer, config, payload, arguments,
                  (rank, arguments, payload is not noise, per_rank, per_expert))
    _tune(buffer, (constant, (values, scales)), layout)
    buffer.destroy()


def _tune(buffer, payloads, layout):
    """One handle for all chunk sizes that they try."""
    size = buffer.group_size
    for payload in payloads:
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            payload, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2], config=deep_ep.Config(24, 8, 256))
        for chunk in (*range(4, 33, 2), None):
            config = (deep_ep.Buffer.get_dispatch_config(size) if chunk is None
                      else deep_ep.Config(24, chunk, 256))
            found = buffer.dispatch(x=payload, handle=handle, config=config)[0]
            assert same(_plain(found), _plain(recv_x))
    rows = _plain(recv_x)
    home = buffer.combine(rows, handle)[0]
    for chunk in (*range(1, 17), None):
        config = (deep_ep.Buffer.get_combine_config(size) if chunk is None
                  else deep_ep.Config(24, chunk, 256))
        assert same(buffer.combine(x=rows, handle=handle, config=config)[0], home)


@pytest.mark.parametrize("size", [2, 4])
def test_the_high_throughput_program_passes(ranks, size):
    ranks.run(size, _as_there, _high_throughput)


def test_the_program_for_several_nodes_passes(node_ranks):
    node_ranks.run(4, over_nodes, 2, _as_there, _high_throughput)


# -- low latency


class _Leaving:
    """Ranks 1 and 3 leave at their first call of a kind; who is expected to be masked by now."""

    AT = {"dispatch": 1, "combine": 3}

    def __init__(self, rank, size, enabled):
        self._rank, self._size, self.enabled = rank, size, enabled
        self.masked = set()

    def leaves(self, kind):
        if self.enabled and self.AT[kind] < self._size:
            self.masked.add(self.AT[kind])
        return self._rank in self.masked

    def check(self, buffer):
        if self.enabled:
            status = torch.zeros(self._size, dtype=torch.int)
            buffer.low_latency_query_mask_buffer(status)
            assert set(status.nonzero().squeeze(-1).tolist()) == self.masked


def _check_expert(rows, count, source, ranges, chosen, exact):
    """`rows` of one expert; `chosen` [R]: how many tokens of each rank name it, masked ones 0."""
    mask = 2 ** 32 - 1
    assert count == (ranges & mask).sum().item() == sum(chosen)
    if not count:
        return
    rows, source = rows[:count], source[:count]
    value = rows[:, :-128].amin(1)
    assert same(value, rows[:, :-128].amax(1))
    if exact:
        assert (rows[:, -128:] - source.view(-1, 1) % TOKENS).sum().item() == 0
    else:
        assert calc_diff(rows[:, -1], source.view(-1)) < 0.007
    for rank, wanted in enumerate(chosen):
        begin, number = (ranges[rank] >> 32).item(), (ranges[rank] & mask).item()
        assert number == wanted
        if exact:
            assert (value == rank - OFFSET).sum().item() == wanted
            assert (rows[begin:begin + number, :-128] - rank + OFFSET).sum().item() == 0


class _LowLatency:
    """The program's state on one rank."""

    def __init__(self, group, leaving, use_logfmt):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.leaving, self.use_logfmt, self.hash = leaving, use_logfmt, 0
        experts = LOCAL * self.size
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, self.size, experts)
        self.buffer = deep_ep.Buffer(
            group, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=LOCAL,
            allow_nvlink_for_low_latency_mode=True, explicitly_destroy=True, allow_mnnvl=False,
            enable_shrink=leaving.enabled, timeout=20)

    def inputs(self, seed):
        self.ids, generator = _gate(self.rank, LOCAL * self.size, seed)
        self.weights = _noise((TOKENS, TOPK), generator).abs()
        for at in torch.randint(0, TOKENS * TOPK, (10,), generator=generator):
            self.ids.view(-1)[at] = -1
        self.everyone = [None] * self.size
        dist.all_gather_object(self.everyone, self.ids.cpu(), group=self.group)
        x = torch.full((TOKENS, HIDDEN), self.rank - OFFSET, dtype=torch.bfloat16)
        x[:, -128:] = torch.arange(TOKENS).bfloat16().view(-1, 1)
        noise = (_noise((TOKENS, HIDDEN), generator) * 0.1).bfloat16()
        return x, noise

    def chosen(self, expert):
        return [0 if rank in self.leaving.masked else (ids == expert).sum().item()
                for rank, ids in enumerate(self.everyone)]

    def dispatch(self, x, constant, hook, form, times):
        use_fp8, round_scale, use_ue8m0 = form
        for _ in range(times):
            stats = torch.zeros(LOCAL, dtype=torch.int)
            recv_x, count, handle, event, receive = self.buffer.low_latency_dispatch(
                x, self.ids, TOKENS, LOCAL * self.size, use_fp8=use_fp8, round_scale=round_scale,
                use_ue8m0=use_ue8m0, cumulative_local_expert_recv_stats=stats,
                async_finish=not hook, return_recv_hook=hook)
            receive() if hook else event.current_stream_wait()
        self.leaving.check(self.buffer)
        if use_fp8:
            recv_x = recv_x[0], recv_x[1].contiguous()
            rows = per_token_cast_back(recv_x[0].view(-1, HIDDEN),
                                       recv_x[1].view(-1, recv_x[1].shape[-1]))
            rows = rows.view(recv_x[0].shape)
        else:
            rows = recv_x.clone()
        for local in range(LOCAL):
            number = count[local].item()
            assert stats[local].item() == number
            chosen = self.chosen(self.rank * LOCAL + local)
            assert sum(chosen) == number
            if constant:
                _check_expert(rows[local], number, handle[0][local], handle[1][local], chosen,
                              not round_scale)
            for part in recv_x if use_fp8 else (recv_x,):
                self.hash ^= hash_tensor(part[local, :number])
        return rows, handle

    def combine(self, x, rows, handle, hook, form):
        for zero_copy in (False,) if self.use_logfmt else (False, True):
            if self.leaving.leaves("combine"):
                return
            if zero_copy:
                self.buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = rows
            out = torch.empty_like(x)
            combined, event, receive = self.buffer.low_latency_combine(
                rows, self.ids, self.weights, handle, use_logfmt=self.use_logfmt,
                async_finish=not hook, zero_copy=zero_copy, return_recv_hook=hook, out=out)
            receive() if hook else event.current_stream_wait()
            self.leaving.check(self.buffer)
            masked = [expert for rank in self.leaving.masked
                      for expert in range(rank * LOCAL, (rank + 1) * LOCAL)]
            gone = torch.isin(self.ids, torch.tensor([-1, *masked]))
            wanted = x.float() * self.weights.masked_fill(gone, 0).sum(1, keepdim=True)
            assert combined is out and not combined.isnan().any()
            if not form[1]:
                assert calc_diff(wanted, combined) < (9e-4 if form[0] else 1e-5), form
            self.hash ^= hash_tensor(combined)

    def run(self, seed):
        self.hash = 0
        forms = [(False, False, False), (True, False, False), (True, True, False),
                 (True, True, True)]
        x, noise = self.inputs(seed)
        for number, (payload, hook, form) in enumerate(
                itertools.product((x, noise), (False, True), forms)):
            if self.leaving.leaves("dispatch"):
                break
            rows, handle = self.dispatch(payload, payload is x, hook, form, (number + 1) % 2 + 1)
            self.combine(payload, rows, handle, hook, form)
        return self.hash


def _low_latency(group, use_logfmt, shrink):
    program = _LowLatency(group, _Leaving(group.rank(), group.size(), shrink), use_logfmt)
    program.run(1)
    if not shrink:  # the same again gives the same, whatever comes in between
        first = [program.run(seed) for seed in (2, 3)]
        for _ in range(3):
            assert program.run(2) == first[0]
    program.buffer.destroy()  # who has left does so while others go on
    dist.barrier(group)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("use_logfmt", [False, True])
def test_the_low_latency_program_passes(ranks, size, use_logfmt):
    ranks.run(size, _as_there, _low_latency, use_logfmt, False)


@pytest.mark.parametrize("size", [2, 4])
def test_the_low_latency_program_passes_while_ranks_leave(ranks, size):
    ranks.run(size, _as_there, _low_latency, False, True)


@pytest.mark.parametrize("use_logfmt, shrink", [(False, False), (True, False), (False, True)])
def test_the_low_latency_program_passes_over_nodes(node_ranks, use_logfmt, shrink):
    node_ranks.run(4, over_nodes, 2, _as_there, _low_latency, use_logfmt, shrink)
