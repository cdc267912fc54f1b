"""Low-latency calls: what arrives by expert, hooks, formats of rows, and what is refused."""

import itertools
import time

import pytest
import torch

import deep_ep
import routing
from routing import calc_diff, kept_weights, make_inputs, same, weighted

MAX_TOKENS, HIDDEN, LOCAL = 24, 1024, 3


def buffer_of(group, **options):
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, group.size(),
                                                         LOCAL * group.size())
    return deep_ep.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=LOCAL, **options)


def inputs_of(group, seed=0, tokens=None, **options):
    size = group.size()
    tokens = [MAX_TOKENS, 0, 7, 1][:size] if tokens is None else tokens
    return make_inputs(size, tokens, hidden=HIDDEN, topk=4, experts=LOCAL * size, seed=seed,
                       **options)


def rows_of(everyone, expert):
    """(source rank, token) of the rows of a global expert, in order; a token once."""
    return [(rank, token) for rank, one in enumerate(everyone)
            for token, ids in enumerate(one.topk_idx.tolist()) if expert in ids]


def dequantised(recv_x, use_ue8m0):
    rows, scales = recv_x
    if use_ue8m0:
        exponents = scales.contiguous().view(torch.uint8)[..., :rows.shape[-1] // 128]
        scales = (exponents.int() << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2)


def _check_rows(everyone, rank, recv_x, count, handle, exact):
    src_info, layout_range, max_tokens, hidden, experts = handle
    size = len(everyone)
    assert (max_tokens, hidden, experts) == (MAX_TOKENS, HIDDEN, LOCAL * size)
    assert src_info.dtype == torch.int32 and layout_range.dtype == torch.int64
    assert recv_x.shape == (LOCAL, size * MAX_TOKENS, HIDDEN)
    assert layout_range.shape == (LOCAL, size)
    for local in range(LOCAL):
        wanted = rows_of(everyone, rank * LOCAL + local)
        assert int(count[local]) == len(wanted)
        assert src_info[local, :len(wanted)].tolist() == [token for _, token in wanted]
        at = 0
        for source, packed in enumerate(layout_range[local].tolist()):
            begin, number = packed >> 32, packed & 0xffffffff
            assert number == sum(1 for one, _ in wanted if one == source)
            assert number == 0 or begin == at
            at += number
        for row, (source, token) in enumerate(wanted):
            found, sent = recv_x[local, row].float(), everyone[source].x[token].float()
            if exact:
                assert same(found, sent)
            else:
                assert calc_diff(found, sent) < 7e-3


def _round_trips(group):
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group)
    assert buffer.low_latency_mode
    stats = torch.full((LOCAL,), 7, dtype=torch.int32, device=routing.DEVICE)  # += is asked for
    waits = torch.zeros(size, dtype=torch.int64, device=routing.DEVICE)
    received = stats.clone()
    forms = itertools.product((False, True), ((False, False, False), (True, False, False),
                                              (True, True, False), (True, True, True)))
    for seed, (hook, (fp8, rounded, ue8m0)) in enumerate(forms):
        everyone = inputs_of(group, seed)
        one = everyone[rank]
        one.topk_weights[one.topk_idx < 0] = float("nan")  # what names no expert does not count
        recv_x, count, handle, event, receive = buffer.low_latency_dispatch(
            one.x, one.topk_idx, MAX_TOKENS, one.experts,
            cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waits,
            use_fp8=fp8, round_scale=rounded, use_ue8m0=ue8m0, async_finish=not hook,
            return_recv_hook=hook)
        assert (receive is not None) == hook and (event.event is not None) == (not hook)
        assert type(handle) is tuple and len(handle) == 5
        receive() if hook else event.current_stream_wait()
        received += count
        if fp8:
            assert recv_x[0].dtype == torch.float8_e4m3fn
            assert recv_x[1].dtype == (torch.int32 if ue8m0 else torch.float32)
            assert recv_x[1].stride(-2) == 1  # column by column
            rows = dequantised(recv_x, ue8m0)
        else:
            rows = recv_x
        _check_rows(everyone, rank, rows, count, handle, exact=not fp8)
        _check_combine(buffer, one, rank, rows.bfloat16(), handle, hook, exact=not fp8)
    assert same(stats, received) and (waits >= 0).all()
    buffer.destroy()


def _opaque(group):
    """Types of one byte are moved as they are, whether or not `use_fp8` is left at its default."""
    buffer, everyone = buffer_of(group), inputs_of(group)
    for one in everyone:
        one.x = one.x.to(torch.int8)
    one = everyone[group.rank()]
    dtypes = torch.int8, torch.uint8, torch.float8_e5m2, torch.float8_e4m3fn
    for dtype, options in itertools.product(dtypes, ({}, {"use_fp8": False})):
        recv_x, count, handle, *_ = buffer.low_latency_dispatch(
            one.x.view(dtype), one.topk_idx, MAX_TOKENS, one.experts, **options)
        assert recv_x.dtype == dtype
        _check_rows(everyone, group.rank(), recv_x.view(torch.int8), count, handle, exact=True)
    buffer.destroy()


def test_any_type_of_one_byte_is_moved_untouched(ranks):
    ranks.run(2, _opaque)


def _check_combine(buffer, one, rank, rows, handle, hook, exact):
    kept = sum(kept_weights(one).unbind(1))
    wanted = one.x.float() * kept.unsqueeze(1)
    # Unreceived rows hold anything, and nothing of it may be used.
    for local, count in enumerate((handle[1] & 0xffffffff).sum(1).tolist()):
        rows[local, count:] = float("nan")
    out = torch.empty_like(one.x)
    # Rows as bfloat16, LogFMT or FP8 on their way home: what each may add to calc_diff.
    wires = ({}, 0.0), ({"use_logfmt": True}, 3e-5), ({"use_fp8": True}, 1e-3)
    for zero_copy, given, (wire, more) in itertools.product((False, True), (None, out), wires):
        x = rows
        if zero_copy:
            x = buffer.get_next_low_latency_combine_buffer(handle)
            assert x.shape == rows.shape and x.dtype == torch.bfloat16
            x.copy_(rows)
            if given is not None:  # DeepEP's tests pass what they wrote to it
                x = torch.full_like(rows, 99)
        combined, event, receive = buffer.low_latency_combine(
            x, one.topk_idx, one.topk_weights, handle, zero_copy=zero_copy,
            async_finish=not hook, return_recv_hook=hook, out=given, **wire)
        receive() if hook else event.current_stream_wait()
        assert (given is None) or combined is out
        if one.x.shape[0]:
            assert calc_diff(combined, wanted) < (1e-5 if exact else 9e-4) + more


def _wires(group):
    """Rows that range over ten octaves: what has come home in fewer bits is not what was sent."""
    buffer = buffer_of(group)
    one = inputs_of(group, tokens=MAX_TOKENS, drop=0)[group.rank()]
    one.x[:, ::128] = 1024
    recv_x, _, handle, *_ = buffer.low_latency_dispatch(one.x, one.topk_idx, MAX_TOKENS,
                                                        one.experts, use_fp8=False)
    exact, logfmt, fp8 = (
        buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle, **wire)[0]
        for wire in ({}, {"use_logfmt": True}, {"use_fp8": True}))
    assert not same(logfmt, exact) and not same(fp8, exact) and not same(logfmt, fp8)
    assert calc_diff(logfmt, exact) < 1e-3 and calc_diff(fp8, exact) < 1e-3
    buffer.destroy()


def test_wires_of_combine_differ(ranks):
    ranks.run(2, _wires)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_go_to_their_experts_and_come_home(ranks, size):
    ranks.run(size, _round_trips)


def _vllm(group):
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(
        group=group, num_nvl_bytes=0,
        num_rdma_bytes=deep_ep.Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_ranks=size,
            num_experts=LOCAL * size),
        low_latency_mode=True, num_qps_per_rank=LOCAL, allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False, explicitly_destroy=True, enable_shrink=False)
    buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
    torch.distributed.barrier(group)  # of the caller's, before the first call
    for seed in range(3):
        one = inputs_of(group, seed)[rank]
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=False, round_scale=False,
            use_ue8m0=False, async_finish=False, return_recv_hook=True)
        hook()
        output = torch.empty_like(one.x)
        result = buffer.low_latency_combine(
            recv_x, one.topk_idx, one.topk_weights, handle, async_finish=False, zero_copy=False,
            return_recv_hook=False, out=output)
        assert result[2] is None and result[1].event is None
        assert not one.x.shape[0] or calc_diff(output, weighted(one)) < 1e-5
    buffer.destroy()


def _tensorrt_llm(group):
    """Neither asynchronous nor a hook: asserts that there is neither."""
    buffer = buffer_of(group)
    one = inputs_of(group)[group.rank()]
    recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
        one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=False)
    assert event.event is None and hook is None
    _, event, hook = buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle)
    assert event.event is None and hook is None
    buffer.destroy()


def _sglang(group):
    """One Buffer serves both modes; it is cleaned where one follows the other."""
    size = group.size()
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, size, LOCAL * size)
    buffer = deep_ep.Buffer(group, 1 << 20, hint, low_latency_mode=True, num_qps_per_rank=24,
                            allow_mnnvl=True)
    for seed in range(4):
        one = inputs_of(group, seed, drop=0.0)[group.rank()]
        arguments = routing.dispatch_arguments(buffer, one)
        got = buffer.dispatch(**arguments)
        combined = buffer.combine(got[0], got[4])[0]
        expected = one.x.float() * arguments["is_token_in_rank"].sum(1, keepdim=True)
        assert same(combined.float(), expected)
        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, one.experts)
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
            x=one.x, topk_idx=one.topk_idx, num_max_dispatch_tokens_per_rank=MAX_TOKENS,
            num_experts=one.experts, use_fp8=False, async_finish=False, return_recv_hook=False)
        result = buffer.low_latency_combine(
            x=recv_x, topk_idx=one.topk_idx, topk_weights=one.topk_weights, handle=handle,
            async_finish=False, return_recv_hook=True)
        result[2]()
        total = one.topk_weights.sum(1, keepdim=True)
        assert not one.x.shape[0] or calc_diff(result[0], one.x.float() * total) < 1e-5
    buffer.destroy()


@pytest.mark.parametrize("caller", [_vllm, _tensorrt_llm, _sglang])
def test_a_framework_calls(ranks, caller):
    ranks.run(2, caller)


def _two_live(group):
    """Two dispatches are sent before either is received; a third is refused and hurts nobody."""
    rank = group.rank()
    buffer = buffer_of(group)
    batches = [inputs_of(group, seed, tokens=[9] * group.size()) for seed in range(3)]

    def send(everyone):
        one = everyone[rank]
        return buffer.low_latency_dispatch(one.x, one.topk_idx, MAX_TOKENS, one.experts,
                                           use_fp8=False, return_recv_hook=True)

    first, second = send(batches[0]), send(batches[1])
    with pytest.raises(deep_ep.Error, match="recv_hook must run") as caught:
        send(batches[2])
    assert caught.value.code == "usage"
    for everyone, sent in ((batches[0], first), (batches[1], second)):
        sent[4]()
        _check_rows(everyone, rank, sent[0], sent[1], sent[2], exact=True)
    with pytest.raises(deep_ep.Error, match="has run already"):
        first[4]()
    third = send(batches[2])
    third[4]()
    # In any order, any number of times, with clones of the handle.
    for everyone, sent in ((batches[2], third), (batches[0], first), (batches[0], first)):
        one = everyone[rank]
        handle = (sent[2][0].clone(), sent[2][1].clone(), *sent[2][2:])
        combined = buffer.low_latency_combine(sent[0], one.topk_idx, one.topk_weights, handle)[0]
        assert calc_diff(combined, weighted(one)) < 1e-5
    buffer.destroy()


def test_two_results_may_live_and_a_third_is_refused(ranks):
    ranks.run(2, _two_live)


def test_the_size_hint_never_raises():
    for values in ((0, 0, 0, 0), (128, 7168, 8, 256), (128, 7168, 3, 7), (1 << 30, 1 << 30, 1, 1)):
        assert deep_ep.Buffer.get_low_latency_rdma_size_hint(*values) > 0


def _dropped(group):
    """What a call uses stays alive until its hook has run."""
    rank = group.rank()
    buffer = buffer_of(group)
    for seed in range(10):
        one = inputs_of(group, seed, tokens=[20] * group.size())[rank]
        want = weighted(one)
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            one.x.clone(), one.topk_idx.clone(), MAX_TOKENS, one.experts, use_fp8=False,
            return_recv_hook=True)
        hook()
        combined, _, hook = buffer.low_latency_combine(
            recv_x, one.topk_idx.clone(), one.topk_weights.clone(),
            (handle[0].clone(), handle[1].clone(), *handle[2:]), return_recv_hook=True)
        del recv_x, handle
        rubbish = [torch.full(shape, 99.0, device=routing.DEVICE).to(dtype) for shape, dtype in
                   (((20, 4), torch.float32), ((20, 4), torch.int64)) for _ in range(8)]
        hook()
        assert calc_diff(combined, want) < 1e-5
        del rubbish
    buffer.destroy()


def test_a_hook_keeps_what_its_call_uses(ranks):
    ranks.run(2, _dropped)


def _graph(group, hook=True, zero_copy=False):
    rank = group.rank()
    buffer = buffer_of(group)
    one = inputs_of(group, 0, tokens=[16] * group.size())[rank]
    static = {name: getattr(one, name).clone() for name in ("x", "topk_idx", "topk_weights")}

    when = {"async_finish": not hook, "return_recv_hook": hook}

    def step():
        recv_x, count, handle, event, receive = buffer.low_latency_dispatch(
            static["x"], static["topk_idx"], MAX_TOKENS, one.experts, use_fp8=False, **when)
        receive() if hook else event.current_stream_wait()
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = recv_x
            recv_x = torch.full_like(recv_x, 99)
        combined, event, receive = buffer.low_latency_combine(
            recv_x, static["topk_idx"], static["topk_weights"], handle, zero_copy=zero_copy, **when)
        receive() if hook else event.current_stream_wait()
        return combined

    graph, combined = routing.captured(group, step)
    for seed in range(1, 30):
        new = inputs_of(group, seed, tokens=[16] * group.size())[rank]
        for name, tensor in static.items():
            tensor.copy_(getattr(new, name))
        graph.replay()
        assert calc_diff(combined, weighted(new)) < 1e-5
    del graph
    buffer.destroy()


def _late_rank(group):
    """What calls waited for whom is added up, of dispatch and of combine."""
    buffer = buffer_of(group)
    one = inputs_of(group, tokens=[5] * group.size())[group.rank()]
    waits = torch.full((2, group.size()), 1000, dtype=torch.int64, device=routing.DEVICE)

    def late(call):
        before = waits.clone()
        torch.distributed.barrier(group)
        if group.rank() == 1:
            time.sleep(0.05)
        got = call()
        assert (waits >= before).all()
        return got, (waits - before).tolist()

    for _ in range(2):
        got, (grown, still) = late(lambda: buffer.low_latency_dispatch(
            one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=False,
            dispatch_wait_recv_cost_stats=waits[0]))
        _check_waits(group.rank(), grown, still)
        _, (still, grown) = late(lambda: buffer.low_latency_combine(
            got[0], one.topk_idx, one.topk_weights, got[2],
            combine_wait_recv_cost_stats=waits[1]))
        _check_waits(group.rank(), grown, still)
    buffer.destroy()


def _check_waits(rank, grown, still):
    """Rank 0 waited for rank 1, which came 50 ms late, and for itself not at all as long."""
    assert still == [0] * len(still)
    if rank == 0:
        assert grown[1] > 10_000_000 and grown[0] < grown[1], grown  # ns, or cycles of over a GHz


def test_waits_for_late_ranks_are_added_up(ranks):
    ranks.run(2, _late_rank)


@pytest.mark.gpu
@pytest.mark.parametrize("size, hook, zero_copy", [(1, True, False), (2, True, False),
                                                   (2, False, False), (2, True, True),
                                                   (2, False, True)])
def test_calls_and_hooks_are_captured_and_replayed(gpu_ranks, size, hook, zero_copy):
    gpu_ranks.run(size, _graph, hook, zero_copy)
