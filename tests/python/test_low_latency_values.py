"""Low latency and high throughput in turns on one Buffer, in every form of the calls: each value
that arrives and comes home, bit by bit against the sums of docs/numerics.md in torch."""

import itertools

import pytest
import torch
from torch.nn.functional import pad

import deep_ep
import routing
from routing import layout_of, make_inputs, over_nodes, same
from test_low_latency import dequantised

# Six scales a row: two int32 with half of the second unused.
MAX_TOKENS, HIDDEN, LOCAL, GROUP = 12, 768, 2, 128
FORMS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
ANYTHING = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])


def _inputs(size, seed):
    """Random values, so that all is rounded; anything at all for the weights of no expert."""
    everyone = make_inputs(size, [MAX_TOKENS, 5, 0, 9][:size], hidden=HIDDEN, topk=4,
                           experts=LOCAL * size, seed=seed, drop=0.3)
    for rank, one in enumerate(everyone):
        random = torch.Generator().manual_seed(10 * seed + rank)
        magnitudes = torch.exp2(torch.randint(-30, 9, (one.x.shape[0], 6), generator=random))
        values = torch.randn(one.x.shape, generator=random).view(-1, 6, GROUP)
        one.x = (values * magnitudes[:, :, None]).flatten(1).bfloat16().to(routing.DEVICE)
        one.topk_idx[:1] = -1  # a token that goes nowhere
        anything = ANYTHING.repeat(one.topk_idx.shape[0], 1).to(routing.DEVICE)
        weights = torch.rand(one.topk_weights.shape, generator=random).to(routing.DEVICE)
        one.topk_weights = torch.where(one.topk_idx < 0, anything, weights)
    return everyone


def _quantised(x, rounded):
    """(codes [N, H], scales [N, H / 128])"""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1).clamp(1e-4)
    # Divided by tensors: a number over a tensor is its reciprocal, rounded, times the number.
    scales, inverse = largest / 448, torch.full_like(largest, 448) / largest
    if rounded:
        mantissa, exponent = torch.frexp(scales)  # of [0.5, 1)
        scales = torch.exp2(exponent - (mantissa == 0.5).int())
        inverse = 1 / scales  # exact
    return (groups * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scales


def _exponents(scales):
    """Four to an int32, the first in the lowest byte."""
    exponents = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return pad(exponents, (0, -scales.shape[-1] % 4)).view(torch.int32)


def _on_arrival(x, form):
    """What is sent for x, and the bfloat16 values that its receiver makes of it."""
    use_fp8, rounded, ue8m0 = form
    if not use_fp8:
        return (x,), x
    codes, scales = _quantised(x, rounded)
    values = codes.float().unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
    return (codes.view(torch.uint8), _exponents(scales) if ue8m0 else scales), (
        values.flatten(-2).bfloat16())


def _expert(rows, expert):
    return (rows.float() * ((expert + 3) / 5)).bfloat16()


def _summed(one, size, form):
    """What comes home of experts that do _expert: rounded once a rank, then once."""
    x, ids, weights = one.x.cpu(), one.topk_idx.cpu(), one.topk_weights.cpu()
    values = _on_arrival(x, form)[1]
    total = torch.zeros(x.shape)
    for rank in range(size):
        partial = torch.zeros(x.shape)
        for expert in range(LOCAL * rank, LOCAL * (rank + 1)):
            weight = torch.zeros(len(x))
            for mine, given in zip((ids == expert).unbind(1), weights.unbind(1)):
                weight += torch.where(mine, given, 0.0)
            # In double the product is exact, so that there is one rounding, as of an fma.
            rows = _expert(values, expert).double() * weight.double()[:, None]
            partial = (partial.double() + rows).float()
        total += partial.bfloat16().float()
    return total.bfloat16()


def _check_arrived(everyone, rank, got, form):
    recv_x, count, (src_info, layout_range, *numbers), *_ = got
    room = len(everyone) * MAX_TOKENS
    parts = recv_x if form[0] else (recv_x,)
    assert numbers == [MAX_TOKENS, HIDDEN, LOCAL * len(everyone)]
    assert parts[0].shape == (LOCAL, room, HIDDEN)
    assert parts[0].dtype == (torch.float8_e4m3fn if form[0] else torch.bfloat16)
    if form[0]:
        assert parts[1].shape == (LOCAL, room, 2 if form[2] else 6)
        assert parts[1].dtype == (torch.int32 if form[2] else torch.float32)
        assert parts[1].stride() == (parts[1].shape[2] * room, 1, room)
        parts = parts[0].view(torch.uint8), parts[1]
    for local in range(LOCAL):
        at = 0
        for source, one in enumerate(everyone):
            tokens = (one.topk_idx == LOCAL * rank + local).any(1).nonzero().flatten()
            end = at + len(tokens)
            assert not len(tokens) or layout_range[local, source] == at << 32 | len(tokens)
            assert same(src_info[local, at:end], tokens.int())
            for found, wanted in zip(parts, _on_arrival(one.x[tokens].cpu(), form)[0]):
                assert same(found[local, at:end], wanted), (form, local, source)
            at = end
        assert count[local] == at


def _combine(buffer, one, rows, handle, hook, zero_copy):
    if zero_copy:
        buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = rows
        rows = torch.full_like(rows, 99)  # of no account then
    out = torch.full_like(one.x, 7)
    combined, event, receive = buffer.low_latency_combine(
        rows, one.topk_idx, one.topk_weights, handle, zero_copy=zero_copy, async_finish=not hook,
        return_recv_hook=hook, out=out)
    receive() if hook else event.current_stream_wait()
    assert combined is out
    return out


def _high_throughput(buffer, one, size):
    """Fills the memory that both share, and leaves it to be cleaned."""
    got = buffer.dispatch(**routing.dispatch_arguments(buffer, one))
    home = buffer.combine(got[0], got[4])[0]
    ranks_of_token = layout_of(one, size)[2].sum(1, keepdim=True)
    assert same(home, (one.x.float() * ranks_of_token).bfloat16())  # a node's sums are exact
    buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, one.experts)


def _program(group):
    rank, size = group.rank(), group.size()
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, size, LOCAL * size)
    buffer = deep_ep.Buffer(group, 1 << 20, hint + (1 << 20), low_latency_mode=True)
    for seed, (hook, form) in enumerate(itertools.product((False, True), FORMS)):
        everyone = _inputs(size, seed)
        one = everyone[rank]
        _high_throughput(buffer, one, size)
        use_fp8, round_scale, use_ue8m0 = form
        got = buffer.low_latency_dispatch(
            one.x, one.topk_idx, MAX_TOKENS, one.experts, use_fp8=use_fp8, round_scale=round_scale,
            use_ue8m0=use_ue8m0, async_finish=not hook, return_recv_hook=hook)
        got[4]() if hook else got[3].current_stream_wait()
        _check_arrived(everyone, rank, got, form)
        values, handle = dequantised(got[0], use_ue8m0).bfloat16() if use_fp8 else got[0], got[2]
        rows = torch.stack([_expert(values[local], LOCAL * rank + local) for local in range(LOCAL)])
        wanted = _summed(one, size, form)
        for zero_copy in (False, True):
            assert same(_combine(buffer, one, rows, handle, hook, zero_copy), wanted), form
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_value_is_that_of_the_formulas(ranks, size):
    ranks.run(size, _program)


@pytest.mark.parametrize("size, ranks_per_node", [(2, 1), (4, 2)])
def test_every_value_between_nodes_is_that_of_the_formulas(node_ranks, size, ranks_per_node):
    node_ranks.run(size, over_nodes, ranks_per_node, _program)
