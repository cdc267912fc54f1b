"""Who keeps what alive, and that nothing grows."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import deep_ep
import routing
from deep_ep._arrays import INT32, UINT8, TorchLibrary, library_of_name
from deep_ep._groups import bootstrap_of
from routing import Expected, clear_on_a_thread, dispatch_arguments, layout_of, make_inputs, same


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _counted(buffer):
    """What must not grow, by name."""
    on_gpu = routing.DEVICE == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    gc.collect()
    counts = {"objects": len(gc.get_objects()),  # a large list, so before memory is looked at
              "resident": resident_bytes(), "mapped": buffer.runtime.mapped_bytes(),
              "live": buffer.runtime.live_bytes()}
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        counts |= {"of the GPU": total - free, "torch has": torch.cuda.memory_reserved(),
                   "torch gave": torch.cuda.memory_allocated()}
    else:
        assert counts["live"] == 0  # on GPUs torch keeps what it had for results
    return counts


def _many_calls(group, steps):
    """By how much each round of steps, of which the first is not looked at, made it grow."""
    size = group.size()
    if routing.DEVICE == "cuda" and torch.cuda.device_count() < size:
        steps //= 10  # ranks that share a GPU take turns, which last
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(8, 32, size, 2 * size)
    buffer = deep_ep.Buffer(group, 1 << 20, hint, low_latency_mode=True)
    one = make_inputs(size, 8, experts=2 * size)[group.rank()]

    def step(number):
        got = buffer.dispatch(**dispatch_arguments(buffer, one), async_finish=number % 3 == 0)
        if got[5].event:
            got[5].current_stream_wait()
        buffer.dispatch(one.x, handle=got[4])
        buffer.combine(got[0], got[4], got[2],
                       previous_event=buffer.capture() if number % 5 == 0 else None)
        hook = number % 2 == 0
        sent = buffer.low_latency_dispatch(one.x, one.topk_idx, 8, one.experts, use_fp8=False,
                                           async_finish=not hook, return_recv_hook=hook)
        sent[4]() if hook else sent[3].current_stream_wait()
        buffer.low_latency_combine(sent[0], one.topk_idx, one.topk_weights, sent[2])

    counts = []
    for _ in range(3):  # pools and caches are as large as they get after the first round
        for number in range(steps):
            step(number)
        counts.append(_counted(buffer))
    buffer.destroy()
    return [{name: after[name] - before[name] for name in after}
            for before, after in zip(counts, counts[1:])]


def test_ten_thousand_calls_leave_nothing_behind(ranks):
    """In two rounds of 6 calls a step; a leak shows in both, what happens once in one of them. One
    lost object of 100 bytes a step would be 100 KB a round."""
    for rounds in ranks.run(2, _many_calls, 1000):
        grown = {name: min(one[name] for one in rounds) for name in rounds[0]}
        assert grown.pop("objects") < 100 and grown.pop("resident") < 75 << 10, rounds
        assert max(grown.values()) <= 0, rounds


def _live_results(group):
    """Results keep their memory: later calls do not write there."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    kept = []
    for step in range(30):
        one = make_inputs(group.size(), 50, hidden=128, experts=2 * group.size(),
                          seed=step)[group.rank()]
        got = buffer.dispatch(**dispatch_arguments(buffer, one))
        view = got[0][1:, ::2]  # a view alone keeps the block
        kept.append((view, view.clone(), got[1], got[1].clone(), got[4][3], got[4][3].clone()))
        del got
    buffer.destroy()
    del buffer
    gc.collect()
    for view, copy, ids, ids_copy, src, src_copy in kept:
        assert torch.equal(view, copy) and torch.equal(ids, ids_copy)
        assert torch.equal(src, src_copy)


def test_live_results_are_not_overwritten(cpu_ranks):
    cpu_ranks.run(2, _live_results)


def _dropped_inputs(group):
    """An asynchronous call uses inputs that nobody else holds any more."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    for step in range(20):
        one = make_inputs(group.size(), 300, hidden=512, experts=2 * group.size(),
                          seed=step)[group.rank()]
        expected = one.x.float()
        arguments = dispatch_arguments(buffer, one, async_finish=True)
        in_rank = arguments["is_token_in_rank"].sum(1, keepdim=True)
        got = buffer.dispatch(**arguments)
        result, handle, event = got[0], got[4], got[5]
        one.x = arguments = got = None
        rubbish = [torch.full((300, 512), -7, dtype=torch.bfloat16) for _ in range(4)]
        event.current_stream_wait()
        kept = result.clone()
        again, *_, event = buffer.dispatch(expected.bfloat16(),
                                           handle=tuple(part.clone() for part in handle),
                                           async_finish=True)
        rubbish = [torch.full(part.shape, 99, dtype=part.dtype) for part in handle
                   for _ in range(4)]
        event.current_stream_wait()
        assert torch.equal(again, kept)
        combined, _, event = buffer.combine(result, handle, async_finish=True)
        result = handle = again = None
        rubbish = [torch.full((300, 512), -7, dtype=torch.bfloat16) for _ in range(4)]
        event.current_stream_wait()
        assert torch.equal(combined.float(), expected * in_rank)
        del rubbish
    buffer.destroy()


def test_asynchronous_calls_hold_what_they_use(cpu_ranks):
    cpu_ranks.run(2, _dropped_inputs)


def _with_allocator(group, allocator, num_rdma_bytes=0):
    """A Buffer of the host whose results come from `allocator`, as those of GPUs do."""
    buffer = deep_ep.Buffer(group, 1 << 20, num_rdma_bytes)
    options = dict.fromkeys(("num_qps_per_rank", "timeout_ms", "num_threads"), 0)
    options |= dict.fromkeys(("low_latency_mode", "allow_nvlink_for_low_latency_mode",
                              "allow_mnnvl", "use_fabric", "explicitly_destroy", "enable_shrink"),
                             False)
    options |= {"device": -1, "num_nvl_bytes": 1 << 20, "num_rdma_bytes": num_rdma_bytes}
    buffer.runtime.destroy()
    buffer.runtime = deep_ep._C.Buffer(bootstrap_of(group), options, allocator)
    return buffer


def _memory_of_torch(group, device):
    """The way of GPUs, on the host: torch allocates what no peer writes, and is asked for the
    rest. With `device` the native module asks torch by itself, unless a call has an event."""
    asked = []

    def allocate(num_bytes, mapped, behind_event, async_finish):
        asked.append((mapped, behind_event, async_finish))
        if mapped:
            return None
        block = torch.full((num_bytes,), 0x5a, dtype=torch.uint8)
        return block.data_ptr(), block

    buffer = _with_allocator(group, deep_ep._C.Allocator(allocate, device, None))
    everyone = make_inputs(group.size(), experts=2 * group.size())
    one = everyone[group.rank()]
    got = buffer.dispatch(**dispatch_arguments(buffer, one))
    by_itself = device is not None and library_of_name("torch").has_calls
    plain = [] if by_itself else [(False, False, False)] * 2
    assert asked == plain + [(True, False, False)] * 2
    Expected(everyone, group.rank()).check(*got[:3], got[4])
    combined = buffer.combine(got[0], got[4], previous_event=buffer.capture())[0]
    assert asked[-1] == (False, True, False)
    again = buffer.combine(got[0], got[4])[0]
    expected = one.x.float() * layout_of(one, group.size())[2].sum(1, keepdim=True)
    assert torch.equal(combined.float(), expected) and torch.equal(again, combined)
    for tensor in (combined, again, got[4][0]):
        assert not tensor._is_view()  # autograd would refuse to change it in place
    del one, got
    gc.collect()
    assert torch.equal(combined.float(), expected) and torch.equal(again, combined)
    buffer.destroy()


@pytest.mark.parametrize("device", [None, -1])
def test_results_in_memory_that_torch_gave_are_plain_tensors(cpu_ranks, device):
    cpu_ranks.run(2, _memory_of_torch, device)


def _pool_of_torch(group):
    """What peers write is taken from torch's pool, unless in a capture; Python is asked where that
    gives memory from elsewhere, as torch does here, where no allocator of the host's has pools."""
    done = []

    def is_capturing():
        done.append("is_capturing")
        return capturing

    def note(name):
        def function(*arguments):
            done.append((name, *arguments))
        return function

    def allocate(*what):
        done.append(what)

    pool = (is_capturing, note("begin"), note("end"), note("release"), (0, (7, 8)))
    buffer = _with_allocator(group, deep_ep._C.Allocator(allocate, -1, pool))
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    capturing = False
    handle = buffer.dispatch(**dispatch_arguments(buffer, one))[4]
    place, asked = (0, (7, 8)), (True, False, False)
    for capturing, between in (
            (False, [("begin", *place), ("end", *place), ("release", *place)]), (True, [])):
        done.clear()
        buffer.dispatch(one.x, handle=handle)
        *found, (num_bytes, *last) = done
        assert found == ["is_capturing", *between] and tuple(last) == asked
        assert num_bytes >= 2 * one.x.shape[1] * handle[3].shape[0]
    buffer.destroy()


def test_what_peers_write_is_asked_of_the_pool(cpu_ranks):
    cpu_ranks.run(2, _pool_of_torch)


def _blocks_of_torch(group):
    """Results of one call share a block, each has what it should be, and the block goes with the
    last of them."""
    def allocate(*_):
        raise AssertionError("torch does without")

    tokens, hidden, experts = 5, 256, 4
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(tokens, hidden, 1, experts)
    buffer = _with_allocator(group, deep_ep._C.Allocator(allocate, -1, None), hint)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids = torch.arange(tokens).remainder(experts)[:, None]
    (recv_x, scales), count, handle, *_ = buffer.low_latency_dispatch(x, ids, tokens, experts)
    results = recv_x, scales, count, *handle[:2]
    assert [one.dtype for one in results] == [torch.float8_e4m3fn, torch.float32, torch.int32,
                                              torch.int32, torch.int64]
    assert scales.shape == (experts, tokens, hidden // 128) and scales.stride(1) == 1
    assert len({one.untyped_storage().data_ptr() for one in results}) == 1
    assert torch.equal(count, torch.tensor([2, 1, 1, 1], dtype=torch.int32))
    found = recv_x[1, 0].float().view(-1, 128) * scales[1, 0][:, None]
    assert torch.allclose(found.flatten(), x[1].float(), rtol=0.07)
    kept = count.clone()
    block = StorageWeakRef(recv_x.untyped_storage())
    del results, scales, recv_x, handle
    assert not block.expired() and torch.equal(count, kept)
    del count
    assert block.expired()
    buffer.destroy()


def test_results_of_a_call_share_a_block_of_torch(cpu_ranks):
    if not library_of_name("torch").has_calls:
        pytest.skip("this torch lacks what the native module allocates with")
    cpu_ranks.run(1, _blocks_of_torch)


def _other_thread(group):
    """Tensors die on a thread that the library has never seen, the last of a call behind another
    call, which may not write there; those of GPUs were used on a second stream."""
    on_gpu = routing.DEVICE == "cuda"
    buffer = deep_ep.Buffer(group, 1 << 20)
    one, other = (make_inputs(group.size(), experts=2 * group.size(), seed=seed)[group.rank()]
                  for seed in range(2))
    held_bytes = torch.cuda.memory_allocated if on_gpu else buffer.runtime.live_bytes
    before = held_bytes()
    for _ in range(3):
        results = [buffer.dispatch(**dispatch_arguments(buffer, one), async_finish=on_gpu)]
        if on_gpu:
            results[0][5].current_stream_wait()
        kept = [results[0][0]]
        want = kept[0].clone().cpu()
        for tensors in (results, kept):
            buffer.dispatch(**dispatch_arguments(buffer, other))
            assert held_bytes() > before and same(kept[0].cpu(), want)
            clear_on_a_thread(tensors)
        assert held_bytes() == before
    buffer.destroy()


def test_results_may_die_on_any_thread(ranks):
    ranks.run(2, _other_thread)


def _dropped_buffer(group):
    """No cycle holds it, nor its memory."""
    on_gpu = routing.DEVICE == "cuda"
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]

    def used_bytes():
        torch.distributed.barrier(group)  # ranks that share a GPU look at the same time
        free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
        torch.distributed.barrier(group)
        return total - free

    for _ in range(2):  # the first leaves what the process keeps for the next one
        before = used_bytes()
        buffer = deep_ep.Buffer(group, 64 << 20 if on_gpu else 1 << 20)
        buffer.dispatch(**dispatch_arguments(buffer, one))
        gone = weakref.ref(buffer)
        del buffer
        assert gone() is None
        grown = used_bytes() - before
    assert grown < 32 << 20


def test_a_dropped_buffer_is_gone_at_once(ranks):
    ranks.run(2, _dropped_buffer)


def test_a_process_may_end_with_everything_alive():
    code = """
import torch, deep_ep
buffer = deep_ep.Buffer(deep_ep.Group.tcp(0, 1), 1 << 20, device="cpu")
ids = torch.zeros((4, 1), dtype=torch.int64)
layout = buffer.get_dispatch_layout(ids, 2)
got = buffer.dispatch(torch.ones(4, 8), None, layout[0], None, layout[3], layout[2],
                      async_finish=True)
again = buffer.combine(got[0], got[4], async_finish=True)
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("compiled", [True, False])
def test_results_in_a_block_are_tensors_of_their_own(compiled):
    """As on GPUs, where torch allocates a block for the results of a call: with and without what
    torch has for compiled code."""
    library = TorchLibrary(torch)
    assert library._reinterpret is not None
    if not compiled:
        library._reinterpret = None
    block = torch.arange(96, dtype=torch.uint8)
    whole = library.make((block, 0, (2, 48), (48, 1)), UINT8)
    columns = library.make((block, 16, (3, 2), (1, 3)), INT32)
    assert torch.equal(whole, block.view(2, 48))
    assert torch.equal(columns, block[16:40].view(torch.int32).view(2, 3).t())
    for tensor in (whole, columns, library.typed(whole, torch.int8)):
        assert not tensor._is_view()
        assert tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
