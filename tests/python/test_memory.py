"""Who keeps what alive, and that nothing grows."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import deep_ep
from deep_ep._arrays import TorchLibrary
from deep_ep._groups import bootstrap_of
from routing import Expected, dispatch_arguments, layout_of, make_inputs


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _many_calls(group, calls):
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), 8, experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)

    def step(number):
        got = buffer.dispatch(**arguments, async_finish=number % 3 == 0)
        if got[5].event:
            got[5].current_stream_wait()
        buffer.dispatch(one.x, handle=got[4])
        buffer.combine(got[0], got[4], got[2])

    for number in range(1500):  # until pools and caches are as large as they get
        step(number)
    gc.collect()
    objects = len(gc.get_objects())  # a large list, so before memory is looked at
    before = resident_bytes()
    mapped = buffer.runtime.mapped_bytes()
    for number in range(calls):
        step(number)
    gc.collect()
    grown = resident_bytes() - before
    assert len(gc.get_objects()) < objects + 100
    assert buffer.runtime.mapped_bytes() == mapped and buffer.runtime.live_bytes() == 0
    buffer.destroy()
    return grown


def test_ten_thousand_calls_leave_nothing_behind(cpu_ranks):
    # 3 calls a step. One lost object of 100 bytes a step would be 340 KB.
    assert max(cpu_ranks.run(2, _many_calls, 3400)) < 256 << 10


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


def _memory_of_torch(group):
    """The way of GPUs, on the host: torch allocates what no peer writes, and is asked for the
    rest."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    asked = []

    def allocate(num_bytes, mapped, behind_event, async_finish):
        asked.append((mapped, behind_event, async_finish))
        if mapped:
            return None
        block = torch.full((num_bytes,), 0x5a, dtype=torch.uint8)
        return block.data_ptr(), block

    options = dict.fromkeys(("num_nvl_bytes", "num_rdma_bytes", "num_qps_per_rank", "timeout_ms",
                             "num_threads"), 0)
    options |= dict.fromkeys(("low_latency_mode", "allow_nvlink_for_low_latency_mode",
                              "allow_mnnvl", "use_fabric", "explicitly_destroy", "enable_shrink"),
                             False)
    buffer.runtime.destroy()
    buffer.runtime = deep_ep._C.Buffer(bootstrap_of(group), {"device": -1, **options}, allocate)
    everyone = make_inputs(group.size(), experts=2 * group.size())
    one = everyone[group.rank()]
    got = buffer.dispatch(**dispatch_arguments(buffer, one))
    assert asked == [(False, False, False)] * 2 + [(True, False, False)] * 2
    Expected(everyone, group.rank()).check(*got[:3], got[4])
    combined = buffer.combine(got[0], got[4], previous_event=buffer.capture())[0]
    expected = one.x.float() * layout_of(one, group.size())[2].sum(1, keepdim=True)
    assert torch.equal(combined.float(), expected)
    assert not combined._is_view()  # autograd would refuse to change it in place
    del one, got
    gc.collect()
    assert torch.equal(combined.float(), expected)
    buffer.destroy()


def test_results_in_memory_that_torch_gave_are_plain_tensors(cpu_ranks):
    cpu_ranks.run(2, _memory_of_torch)


def _other_thread(group):
    """Tensors die on a thread that the library has never seen."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    results = [buffer.dispatch(**dispatch_arguments(buffer, one))]
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert buffer.runtime.live_bytes() == 0
    buffer.destroy()


def test_results_may_die_on_any_thread(cpu_ranks):
    cpu_ranks.run(2, _other_thread)


def _dropped_buffer(group):
    buffer = deep_ep.Buffer(group, 1 << 20)
    gone = weakref.ref(buffer)
    del buffer
    assert gone() is None  # no cycle holds it
    torch.distributed.barrier(group)


def test_a_dropped_buffer_is_gone_at_once(cpu_ranks):
    cpu_ranks.run(2, _dropped_buffer)


def test_a_process_may_end_with_everything_alive():
    code = """
import torch, deep_ep
buffer = deep_ep.Buffer(deep_ep.Group.tcp(0, 1), 1 << 20)
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
    whole = library.make((block, 0, (2, 48), (48, 1)), torch.uint8)
    columns = library.make((block, 16, (3, 2), (1, 3)), torch.int32)
    assert torch.equal(whole, block.view(2, 48))
    assert torch.equal(columns, block[16:40].view(torch.int32).view(2, 3).t())
    for tensor in (whole, columns):
        assert not tensor._is_view()
        assert tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
