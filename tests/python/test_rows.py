"""Beyond DeepEP's calls: counts ahead of the rows, outputs of the caller's, rows grouped by
expert."""

import weakref

import pytest
import torch

import deep_ep
import routing
from routing import Expected, dispatch_arguments, kept_weights, layout_of, make_inputs, same


def buffer_of(group):
    return deep_ep.Buffer(group, deep_ep.Config().get_nvl_buffer_size_hint(512, group.size()))


def inputs_of(group, tokens=17, **options):
    size = group.size()
    everyone = make_inputs(size, tokens, experts=2 * size, **{"hidden": 64, **options})
    return everyone, everyone[group.rank()], Expected(everyone, group.rank())


def empty(rows, like):
    """An output full of rubbish."""
    return torch.full((rows, *like.shape[1:]), 77, device=routing.DEVICE).to(like.dtype)


def _prepared(group, tokens):
    rank = group.rank()
    buffer = buffer_of(group)
    everyone, one, expected = inputs_of(group, tokens)
    arguments = dispatch_arguments(buffer, one)
    del arguments["num_tokens_per_rdma_rank"]
    ahead = buffer.prepare_dispatch(**arguments, expert_alignment=4)
    assert isinstance(ahead, deep_ep.PreparedDispatch)
    assert ahead.num_recv_tokens == expected.rows
    aligned = [-(-count // 4) * 4 for count in expected.per_expert]
    assert ahead.num_recv_tokens_per_expert_list == aligned
    assert (ahead.num_experts, ahead.expert_alignment) == (one.experts, 4)
    unknown = [index for index, part in enumerate(ahead.handle) if part is None]
    assert unknown == ([2, 3] if len(ahead.handle) == 6 else [3, 5, 7, 9])
    rest = {"topk_idx": one.topk_idx, "topk_weights": one.topk_weights}
    for extra in (0, 3):  # outputs of just the size, and larger ones
        outputs = {"recv_x": empty(expected.rows + extra, one.x),
                   "recv_topk_idx": empty(expected.rows + extra, one.topk_idx),
                   "recv_topk_weights": empty(expected.rows + extra, one.topk_weights)}
        got = buffer.dispatch(one.x, **rest, prepared=ahead, **outputs)
        assert got[3] == aligned
        expected.check(got[0], got[1], got[2], got[4])
        for result, output in zip(got, outputs.values()):
            assert result.shape[0] == expected.rows
            assert result.data_ptr() == output.data_ptr()
            assert (output[expected.rows:] == 77).all()
        plain = buffer.dispatch(**arguments, expert_alignment=4)
        assert all(same(*pair) for pair in zip(got[4], plain[4]))
        combined = buffer.combine(got[0], got[4])[0]
        ranks_of_token = layout_of(one, group.size())[2].sum(1, keepdim=True)
        assert same(combined.float(), one.x.float() * ranks_of_token)
        assert same(buffer.dispatch(one.x, handle=got[4])[0], got[0])
    # As data: clones of what was found serve as well, and other values go the same way.
    clone = ahead._replace(handle=tuple(None if part is None else part.clone()
                                        for part in ahead.handle))
    again = buffer.dispatch(-one.x, **rest, prepared=clone, async_finish=True)
    again[5].current_stream_wait()
    assert same(again[0], -plain[0])
    buffer.destroy()
    return rank


@pytest.mark.parametrize("size, tokens", [(1, 5), (2, 17), (4, [9, 0, 0, 30])], ids=str)
def test_counts_come_ahead_and_rows_into_outputs_of_that_size(ranks, size, tokens):
    ranks.run(size, _prepared, tokens)


def _into_an_earlier_result(group):
    """Peers write to it directly; the bytes in use stay as they were."""
    buffer = buffer_of(group)
    _, one, expected = inputs_of(group)
    arguments = dispatch_arguments(buffer, one)
    first = buffer.dispatch(**arguments)
    place, live = first[0].data_ptr(), buffer.runtime.live_bytes()
    second = buffer.dispatch(-one.x, handle=first[4], recv_x=first[0])
    assert second[0].data_ptr() == place and second[1:5] == (None,) * 4
    assert same(second[0], -torch.stack(expected.x)) and same(first[0], second[0])
    if routing.DEVICE == "cpu":  # on GPUs memory goes back behind the stream's work
        assert buffer.runtime.live_bytes() == live
    buffer.destroy()


def test_rows_may_go_into_an_earlier_result(ranks):
    ranks.run(2, _into_an_earlier_result)


def _fp8_outputs(group):
    buffer = buffer_of(group)
    _, one, expected = inputs_of(group, hidden=256)
    scales = torch.rand((2, 17), device=routing.DEVICE).t()
    payload = (one.x.to(torch.float8_e4m3fn), scales)
    arguments = {**dispatch_arguments(buffer, one), "x": payload}
    want = buffer.dispatch(**arguments)[0]
    rows, columns = torch.empty_like(want[0]), torch.empty_like(want[1])
    got = buffer.dispatch(**arguments, recv_x=(rows, columns))[0]
    assert got[0] is rows and got[1] is columns
    assert same(rows.view(torch.uint8), want[0].view(torch.uint8)) and same(columns, want[1])
    only_rows = buffer.dispatch(**arguments, recv_x=rows)[0]
    assert only_rows[0] is rows and same(only_rows[1], want[1])
    got = buffer.dispatch(**arguments, recv_x=(rows.clone(), columns.clone()), async_finish=True)
    got[5].current_stream_wait()
    assert same(got[0][0].view(torch.uint8), want[0].view(torch.uint8)) and same(got[0][1], want[1])
    # The call holds outputs that nobody else does; on GPUs their memory, of which torch is told.
    del got
    output = rows.clone()
    still = weakref.ref(output)
    event = buffer.dispatch(**arguments, recv_x=output, async_finish=True)[5]
    del output
    assert still() is not None or routing.DEVICE == "cuda"
    event.current_stream_wait()
    buffer.destroy()


def test_outputs_may_be_quantised_rows_and_their_scales(ranks):
    ranks.run(2, _fp8_outputs)


def _own_layout(group):
    """With num_experts the call finds the layout itself, and the handle has it."""
    buffer = buffer_of(group)
    _, one, expected = inputs_of(group)
    rest = {"topk_idx": one.topk_idx, "topk_weights": one.topk_weights, "num_experts": one.experts}
    want = buffer.dispatch(**dispatch_arguments(buffer, one))
    for more in ({}, {"prepared": buffer.prepare_dispatch(one.x, **rest)}):
        got = buffer.dispatch(one.x, **rest, **more)
        assert got[3] == expected.per_expert
        expected.check(got[0], got[1], got[2], got[4])
        assert all(same(*pair) for pair in zip(got[4], want[4]))
        assert same(buffer.combine(got[0], got[4])[0], buffer.combine(want[0], want[4])[0])
    buffer.destroy()


def test_a_dispatch_finds_its_layout_itself(ranks):
    ranks.run(2, _own_layout)


def check_groups(got, expected, alignment, local):
    """Loops over what arrived: every group has its rows in order, then zeros."""
    offsets = got.groups.group_offsets.tolist()
    assert offsets[0] == 0 and len(offsets) == local + 1
    ids = torch.stack(expected.topk_idx).tolist() if expected.rows else []
    recv_rows, weights = got.groups.recv_rows.tolist(), got.groups.weights.tolist()
    for expert in range(local):
        begin, end = offsets[expert:expert + 2]
        mine = [row for row in range(expected.rows) if expert in ids[row]]
        entries = sum(row.count(expert) for row in ids)
        assert end - begin == -(-entries // alignment) * alignment
        assert recv_rows[begin:end] == mine + [-1] * (end - begin - len(mine))
        for at, row in enumerate(mine, begin):
            assert same(got.grouped_x[at], expected.x[row])
            slots = [k for k, one in enumerate(ids[row]) if one == expert]
            assert weights[at] == sum(float(expected.topk_weights[row][k]) for k in slots)
            assert all(int(got.groups.grouped_rows[row, k]) == at for k in slots)
        assert not got.grouped_x[begin + len(mine):end].float().any()
        assert not any(weights[begin + len(mine):end])
    return offsets[-1]


def one_process(one):
    """What expert e, which multiplies by e + 1, makes of a rank's tokens: integers / 8, exact."""
    factors = torch.where(one.topk_idx >= 0, (one.topk_idx + 1) * one.topk_weights, 0.0)
    return one.x.float() * factors.sum(1, keepdim=True)


def _grouped(group, options):
    rank, alignment = group.rank(), 4
    buffer = buffer_of(group)
    _, one, expected = inputs_of(group, dtype=torch.float32, **options)
    arguments = dispatch_arguments(buffer, one)
    del arguments["num_tokens_per_rdma_rank"]
    rest = {"topk_idx": one.topk_idx, "topk_weights": one.topk_weights}
    forms = [{**arguments, "expert_alignment": alignment},
             {**arguments, "expert_alignment": alignment, "num_worst_tokens": 200},
             {"x": one.x, **rest, "num_experts": one.experts, "expert_alignment": alignment},
             {"x": one.x, **rest, "async_finish": True, "prepared": buffer.prepare_dispatch(
                 **arguments, expert_alignment=alignment)}]
    for form in forms:
        got = buffer.dispatch_grouped(**form)
        assert isinstance(got, deep_ep.GroupedDispatch)
        assert isinstance(got.groups, deep_ep.RowGroups)
        with got.event:
            pass
        expected.check(got.recv_x, got.recv_topk_idx, got.recv_topk_weights, got.handle)
        used = check_groups(got, expected, alignment, 2)
        if "num_worst_tokens" not in form:
            assert got.grouped_x.shape[0] == used
        out = torch.empty_like(got.grouped_x)
        for expert, (begin, end) in enumerate(zip(got.groups.group_offsets.tolist(),
                                                  got.groups.group_offsets.tolist()[1:])):
            out[begin:end] = got.grouped_x[begin:end] * (2 * rank + expert + 1)
        combined, sums, _ = buffer.combine(out, got.handle, got.recv_topk_weights,
                                           groups=got.groups)
        assert same(combined, one_process(one))
        assert same(sums, kept_weights(one))
        # The same rows once more, into the caller's memory; and unweighted.
        place = torch.full_like(got.grouped_x, 77)
        again = buffer.dispatch_grouped(-one.x, got.handle, got.groups, grouped_x=place)
        assert again.grouped_x is place and again.groups is got.groups
        assert same(place[:used], -got.grouped_x[:used])
        count = torch.zeros((one.x.shape[0], 1), device=routing.DEVICE)
        for token, ids in enumerate(one.topk_idx.tolist()):
            count[token] = len(set(ids) - {-1})
        plain = buffer.combine(got.grouped_x, got.handle, groups=got.groups._replace(weights=None))
        assert same(plain[0], one.x * count)
    buffer.destroy()


@pytest.mark.parametrize("size, options", [
    (1, {}),
    (2, {"tokens": [0, 9]}),
    (2, {"topk": 7, "drop": 0.0}),  # more than there are experts: duplicates
    (4, {}),
], ids=str)
def test_rows_are_grouped_by_expert_and_combined_from_there(ranks, size, options):
    ranks.run(size, _grouped, options)


def _grouped_fp8(group):
    """Scales are grouped with their rows; too little room for the groups is an error."""
    buffer = buffer_of(group)
    _, one, expected = inputs_of(group, hidden=256, drop=0.0)
    scales = torch.rand((17, 2), device=routing.DEVICE)
    arguments = {"x": (one.x.to(torch.float8_e4m3fn), scales), "topk_idx": one.topk_idx,
                 "topk_weights": one.topk_weights, "num_experts": one.experts}
    got = buffer.dispatch_grouped(**arguments)
    rows, columns = got.grouped_x
    assert rows.dtype == torch.float8_e4m3fn and columns.shape == (rows.shape[0], 2)
    for at, row in enumerate(got.groups.recv_rows.tolist()):
        if row >= 0:
            assert same(rows[at].view(torch.uint8), got.recv_x[0][row].view(torch.uint8))
            assert same(columns[at], got.recv_x[1][row])
    place = (torch.empty_like(rows), torch.empty_like(columns))
    again = buffer.dispatch_grouped(**arguments, grouped_x=place)
    assert again.grouped_x[0] is place[0] and again.grouped_x[1] is place[1]
    assert same(place[1], columns)
    code = ""
    try:
        buffer.dispatch_grouped(**arguments, num_worst_tokens=100,
                                grouped_x=tuple(part[:3] for part in place))
        if routing.DEVICE == "cuda":  # the kernel finds it
            torch.cuda.synchronize()
            buffer.check()
    except deep_ep.Error as error:
        code = error.code
    buffer.destroy()
    return code


def test_scales_are_grouped_with_their_rows(ranks):
    assert "capacity" in ranks.run(2, _grouped_fp8)


def _refusals(group):
    """Types are refused before anybody is told; what the library refuses names the argument."""
    buffer = deep_ep.Buffer(group, 1 << 20, timeout=5)
    _, one, expected = inputs_of(group)
    arguments = dispatch_arguments(buffer, one)
    got = buffer.dispatch(**arguments)
    with pytest.raises(TypeError, match="prepared is <class 'tuple'>"):
        buffer.dispatch(one.x, prepared=())
    with pytest.raises(TypeError, match="groups is a tuple of 3"):
        buffer.combine(one.x, got[4], groups=(one.x,) * 3)
    with pytest.raises(TypeError, match="recv_x is builtins.list"):
        buffer.dispatch(one.x, handle=got[4], recv_x=[1])
    with pytest.raises(TypeError, match="positional"):
        buffer.combine(one.x, got[4], None, None, None, None, False, False, None, None)
    buffer.combine(got[0], got[4])  # nobody was hurt
    with pytest.raises(deep_ep.Error) as caught:
        buffer.dispatch(**arguments, recv_x=empty(expected.rows - 1, one.x))
    buffer.destroy()
    return f"recv_x is bfloat16[{expected.rows - 1}, 64], it needs at least" in str(caught.value)


def test_what_is_not_allowed_is_refused(cpu_ranks):
    assert any(cpu_ranks.run(2, _refusals))  # a rank may hear of the other's first
