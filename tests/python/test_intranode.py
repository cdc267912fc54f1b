"""dispatch and combine on CPU tensors: what arrives, in every calling form."""

import pytest
import torch

import deep_ep
import routing
from deep_ep._arrays import library_of_name
from routing import (Expected, Inputs, calc_diff, dispatch_arguments, kept_weights, layout_of,
                     make_inputs, num_rows_of, rows_by_source, same)


def buffer_of(group, **options):
    return deep_ep.Buffer(group, deep_ep.Config().get_nvl_buffer_size_hint(64, group.size()),
                          **options)


def _layout(group):
    buffer = buffer_of(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    per_rank, per_expert, in_rank = layout_of(one, group.size())
    for ids in (one.topk_idx, one.topk_idx.int()):
        found = buffer.get_dispatch_layout(ids, one.experts)
        assert found[1] is None and isinstance(found[4], deep_ep.EventOverlap)
        assert found[4].event is None
        assert same(found[0], per_rank) and found[0].dtype == torch.int32
        assert same(found[2], per_expert) and found[2].dtype == torch.int32
        assert same(found[3], in_rank) and found[3].dtype == torch.bool
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_layout_is_what_the_ids_say(ranks, size):
    ranks.run(size, _layout)


def _round_trip(group, tokens, options):
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group)
    everyone = make_inputs(size, tokens, experts=2 * size, **options)
    for other in everyone:  # what names no expert does not count
        other.topk_weights[other.topk_idx < 0] = float("nan")
    one, expected = everyone[rank], Expected(everyone, rank)
    recv_x, ids, weights, counts, handle, event = buffer.dispatch(**dispatch_arguments(buffer, one))
    assert event.event is None and recv_x.shape == (expected.rows, one.x.shape[1])
    assert counts == expected.per_expert and all(type(count) is int for count in counts)
    expected.check(recv_x, ids, weights, handle)
    assert type(handle) is tuple and len(handle) == 6
    assert all(isinstance(part, torch.Tensor) for part in handle)
    assert handle[3].shape[0] == expected.rows
    before = [0] + handle[0][:, rank].tolist()  # rank_prefix_matrix: rows by source
    assert [after - at for at, after in zip(before, before[1:])] == expected.from_rank
    combined, combined_weights, event = buffer.combine(recv_x, handle, weights)
    ranks_of_token = layout_of(one, size)[2].sum(1, keepdim=True)
    assert event.event is None
    assert same(combined.float(), one.x.float() * ranks_of_token)
    assert same(combined_weights, kept_weights(one))
    without = buffer.combine(recv_x, handle)
    # What calls have no use for they do not look at.
    partly = (handle[0], "no", "array", *handle[3:])
    assert same(buffer.combine(recv_x, partly)[0], without[0])
    assert without[1] is None and same(without[0], combined)
    buffer.destroy()


@pytest.mark.parametrize("size, tokens, options", [
    (1, 5, {}),
    (2, 17, {}),
    (3, [0, 9, 4], {}),
    (4, [7, 0, 0, 1], {"topk": 1}),
    (4, 33, {"topk": 9, "drop": 0.0}),            # more than there are experts: duplicates
    (4, 6, {"drop": 1.0}),                        # nobody wants any token
    (2, 11, {"hidden": 8}),                       # 16 bytes, what slime sends
    (2, 5, {"hidden": 7176}),                     # no multiple of 128
    (2, 17, {"dtype": torch.float16}),
    (2, 17, {"dtype": torch.float32}),
], ids=str)
def test_rows_arrive_in_order_and_come_home_summed(ranks, size, tokens, options):
    ranks.run(size, _round_trip, tokens, options)


def _forms(group):
    """previous_event x asynchronous x payload x with topk, as DeepEP's own test goes."""
    rank, size = group.rank(), group.size()
    buffer = buffer_of(group)
    everyone = make_inputs(size, 40, hidden=256, experts=4 * size)
    one, expected = everyone[rank], Expected(everyone, rank)
    scales = torch.rand((2, 40), device=routing.DEVICE).t()  # column-major
    payloads = [one.x, torch.ones_like(one.x) * rank, (one.x.to(torch.float8_e4m3fn), scales)]
    for previous in (False, True):
        for asynchronous in (False, True):
            for payload in payloads:
                for with_topk in (False, True):
                    arguments = dispatch_arguments(buffer, one, async_finish=asynchronous)
                    arguments["config"] = deep_ep.Config(24, 8, 256)
                    arguments["x"] = payload
                    if not with_topk:
                        del arguments["topk_idx"], arguments["topk_weights"]
                    if previous:
                        arguments["previous_event"] = buffer.capture()
                        arguments["allocate_on_comm_stream"] = asynchronous
                    result = buffer.dispatch(**arguments)
                    assert (result[5].event is not None) == asynchronous
                    with result[5]:
                        pass
                    _check_form(buffer, result, payload, expected, with_topk, arguments)
    buffer.destroy()


def _check_form(buffer, result, payload, expected, with_topk, arguments):
    recv_x, ids, weights, counts, handle, _ = result
    assert counts == expected.per_expert
    if with_topk:
        assert same(ids, torch.stack(expected.topk_idx))
        worst = buffer.dispatch(**{**arguments, "num_worst_tokens": 400})
        if worst[5].event is not None:
            worst[5].current_stream_wait()
        assert worst[3] == [] and num_rows_of(worst[4]) == 400
        for found, wanted in zip(*(one if isinstance(one, tuple) else (one,)
                                   for one in (worst[0], recv_x))):
            assert found.shape[0] == 400
            assert same(found[:expected.rows].view(torch.uint8), wanted.view(torch.uint8))
        assert same(worst[1][:expected.rows], ids)
        assert (worst[1][expected.rows:] == -1).all()
        assert same(worst[2][:expected.rows], weights)
    else:
        assert ids is None and weights is None
    cached = buffer.dispatch(payload, handle=handle, config=deep_ep.Config(24, 4, 64))
    assert cached[1:5] == (None, None, None, None)
    if isinstance(payload, tuple):
        assert isinstance(recv_x, tuple) and recv_x[0].dtype == torch.float8_e4m3fn
        assert recv_x[1].dtype == torch.float32 and recv_x[1].shape == (expected.rows, 2)
        assert same(cached[0][0].view(torch.uint8), recv_x[0].view(torch.uint8))
        assert same(cached[0][1], recv_x[1])
        recv_x = recv_x[0].to(torch.bfloat16)
    else:
        assert same(cached[0], recv_x)
    combined = buffer.combine(recv_x, handle, config=deep_ep.Config(24, 3, 256))[0]
    sent = payload[0] if isinstance(payload, tuple) else payload
    ranks_of_token = arguments["is_token_in_rank"].sum(1, keepdim=True)
    assert calc_diff(combined, sent.float() * ranks_of_token) < 5e-6


@pytest.mark.parametrize("size", [2, 4])
def test_every_form_of_a_call_gives_the_same(ranks, size):
    ranks.run(size, _forms)


def _opaque(group):
    """Types that the library does not know are moved as bytes."""
    size = group.size()
    buffer = buffer_of(group)
    one = make_inputs(size, experts=2 * size)[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    for dtype in (torch.int8, torch.uint8, torch.float8_e5m2):
        payload = torch.randint(0, 256, one.x.shape, dtype=torch.uint8,
                                device=routing.DEVICE).view(dtype)
        result = buffer.dispatch(**{**arguments, "x": payload})
        assert result[0].dtype == dtype
        own = [0, *rows_by_source(result[4], group.rank())][group.rank()]
        kept = arguments["is_token_in_rank"][:, group.rank()]
        mine = result[0][own:own + int(kept.sum())]
        assert same(mine.view(torch.uint8), payload.view(torch.uint8)[kept])
    packed = torch.randint(0, 2**31, (one.x.shape[0], 3), dtype=torch.int32,
                           device=routing.DEVICE)
    quantised = one.x.to(torch.float8_e4m3fn)
    result = buffer.dispatch(**{**arguments, "x": (quantised, packed)})
    for found, sent in zip(result[0], (quantised, packed)):
        assert found.dtype == sent.dtype
        assert same(found[own:own + len(mine)].view(torch.uint8), sent[kept].view(torch.uint8))
    buffer.destroy()


def test_any_type_of_one_byte_is_moved_untouched(ranks):
    ranks.run(2, _opaque)


def _bias(group):
    size = group.size()
    buffer = buffer_of(group)
    one = make_inputs(size, experts=2 * size)[group.rank()]
    recv_x, _, _, _, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    plain = buffer.combine(recv_x, handle)[0]
    first, second = torch.full_like(one.x, 2), torch.full_like(one.x, -5)
    assert same(buffer.combine(recv_x, handle, bias=first)[0], plain + 2)
    assert same(buffer.combine(recv_x, handle, bias=(first, second))[0], plain - 3)
    buffer.destroy()


def test_biases_are_added_behind_the_rows(ranks):
    ranks.run(2, _bias)


def _alignment(group):
    size = group.size()
    buffer = buffer_of(group)
    everyone = make_inputs(size, experts=2 * size)
    one = everyone[group.rank()]
    counts = buffer.dispatch(**dispatch_arguments(buffer, one, expert_alignment=128))[3]
    assert counts == [-(-count // 128) * 128
                      for count in Expected(everyone, group.rank()).per_expert]
    buffer.destroy()


def test_counts_are_rounded_up_to_the_alignment(ranks):
    ranks.run(2, _alignment)


def _local_buffer(group):
    buffer = buffer_of(group)
    whole = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    assert whole.dtype == torch.int8 and whole.numel() > 1 << 20
    part = buffer.get_local_buffer_tensor(torch.float32, torch.Size([3, 5]), offset=64)
    assert part.shape == (3, 5)
    assert part.data_ptr() == whole.data_ptr() + 64
    with pytest.raises(ValueError, match="size"):
        buffer.get_local_buffer_tensor(torch.int8, torch.Size([whole.numel() + 1]))
    assert buffer.get_comm_stream() is not None
    buffer.destroy()


def test_the_local_buffer_is_a_tensor(ranks):
    ranks.run(1, _local_buffer)


def _older_torch(group):
    """Without DLPack's exchange interface a tensor is asked for each of its properties."""
    library = library_of_name("torch")
    known = library.native
    library.native = deep_ep._C.Library(object, library.view, library.make, library.typed)
    try:
        _round_trip(group, 17, {})
        _opaque(group)
    finally:
        library.native = known


def test_older_versions_of_torch_do_as_well(ranks):
    ranks.run(2, _older_torch)


def _gradients_asked(group):
    """Tensors that ask for gradients, and parameters, are taken as they are."""
    buffer = buffer_of(group)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    want = buffer.dispatch(**arguments)[0]
    for x in (one.x.clone().requires_grad_(), torch.nn.Parameter(one.x.clone())):
        found = buffer.dispatch(**{**arguments, "x": x})[0]
        assert same(found, want) and not found.requires_grad
    buffer.destroy()


def test_tensors_that_ask_for_gradients_are_taken(ranks):
    ranks.run(2, _gradients_asked)


def test_inputs_are_worth_testing_with():
    one = Inputs(1)
    assert (one.topk_idx == -1).any() and (one.topk_idx >= 0).any() and one.x.any()
