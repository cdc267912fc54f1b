"""What events stand for: in which order the work of several streams is done. Whoever did not wait
would read what was there before, which is something else and not zero."""

import itertools

import pytest
import torch

import deep_ep
import test_low_latency
from routing import calc_diff, dispatch_arguments, layout_of, same, weighted
from test_gpu import CYCLES, _buffer, _inputs, _sum_of

pytestmark = pytest.mark.gpu


class _Streams:
    """One that writes the input of a call late, one that issues the call and itself waits for
    nobody, and one that reads what the call gives."""

    def __init__(self):
        self.writer, self.caller, self.reader = (torch.cuda.Stream() for _ in range(3))

    def write(self, target, value, cycles=CYCLES):
        """An event: `target` has got `value`."""
        torch.cuda.synchronize()  # both are there, and nothing else is under way
        with torch.cuda.stream(self.writer):
            torch.cuda._sleep(cycles)
            target.copy_(value)
            return deep_ep.Buffer.capture()

    def read(self, event, tensors):
        """Copies of them, made behind the event."""
        with torch.cuda.stream(self.reader):
            event.current_stream_wait()
            copies = [tensor.clone() for tensor in tensors]
        torch.cuda.synchronize()
        return copies


def _behind_an_event(group):
    """Every call, with the input that it moves written late. Each has values of its own, so that
    none finds what it should give in memory that an earlier one left."""
    size, buffer, streams = group.size(), _buffer(group), _Streams()
    factors = itertools.count(2)  # few enough for exact sums

    def late(call, target, value, on_comm):
        """The tensors that call() gives, whose event comes last."""
        event = streams.write(target, value)
        with torch.cuda.stream(streams.caller):
            got = call(previous_event=event, async_finish=True, allocate_on_comm_stream=on_comm)
        return streams.read(got[-1], [one for one in got if isinstance(one, torch.Tensor)])

    # More than once: a kernel that has to be loaded first waits for what runs.
    for seed, on_comm in itertools.product(range(2), (False, True)):
        one = _inputs(group, seed)
        ids = torch.zeros_like(one.topk_idx)
        found = late(lambda **when: buffer.get_dispatch_layout(ids, one.experts, **when),
                     ids, one.topk_idx, on_comm)
        assert all(same(*pair) for pair in zip((found[0], *found[-2:]), layout_of(one, size)))

        arguments = dispatch_arguments(buffer, one)
        rows, ids, weights, _, handle, _ = buffer.dispatch(**arguments)
        for worst in (0, 64 * size):  # with it the host does not wait for the call either
            x, factor = torch.full_like(one.x, 9), next(factors)
            found = late(lambda **when: buffer.dispatch(**{**arguments, "x": x},
                                                        num_worst_tokens=worst, **when),
                         x, one.x * factor, on_comm)
            wanted = rows * factor, ids, weights
            assert all(same(part[:len(rows)], want) for part, want in zip(found, wanted))

        x, factor = torch.full_like(one.x, 9), next(factors)
        found = late(lambda **when: buffer.dispatch(x, handle=handle, **when),
                     x, one.x * factor, on_comm)
        assert same(found[0], rows * factor)

        x, factor = torch.full_like(rows, 9), next(factors)
        found = late(lambda **when: buffer.combine(x, handle, **when), x, rows * factor, on_comm)
        assert same(found[0].float(), _sum_of(one, group) * factor)
    buffer.destroy()


def test_calls_and_readers_come_behind_events(gpu_ranks):
    gpu_ranks.run(2, _behind_an_event)


def _low_latency_between_streams(group):
    """Low-latency calls come behind their caller's stream, which waits for the event."""
    rank, buffer, streams = group.rank(), test_low_latency.buffer_of(group), _Streams()
    for seed in range(3):
        everyone = test_low_latency.inputs_of(group, seed, tokens=[9] * group.size())
        one = everyone[rank]
        x = torch.full_like(one.x, 9)
        event = streams.write(x, one.x)
        with torch.cuda.stream(streams.caller):
            event.current_stream_wait()
            recv_x, count, handle, after, _ = buffer.low_latency_dispatch(
                x, one.topk_idx, test_low_latency.MAX_TOKENS, one.experts, use_fp8=False,
                async_finish=True)
        rows, count = streams.read(after, (recv_x, count))
        test_low_latency._check_rows(everyone, rank, rows, count, handle, exact=True)

        x = torch.full_like(rows, 9)
        event = streams.write(x, rows)
        with torch.cuda.stream(streams.caller):
            event.current_stream_wait()
            combined, after, _ = buffer.low_latency_combine(
                x, one.topk_idx, one.topk_weights, handle, async_finish=True)
        combined = streams.read(after, (combined,))[0]
        assert calc_diff(combined, weighted(one)) < 1e-5
    buffer.destroy()


def test_low_latency_calls_and_readers_come_behind_events(gpu_ranks):
    gpu_ranks.run(2, _low_latency_between_streams)


def _as_a_context(group):
    """`with event:` waits at its end, not before."""
    buffer, streams = _buffer(group), _Streams()
    one = _inputs(group)
    rows, _, _, _, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    for factor in (2, 3):  # as above
        x = torch.full_like(rows, 9)
        before = streams.write(x, rows * factor, 20 * CYCLES)
        with torch.cuda.stream(streams.caller):
            combined, _, after = buffer.combine(x, handle, previous_event=before,
                                                async_finish=True)
        with torch.cuda.stream(streams.reader):
            with after as entered:
                assert entered is after
                inside = torch.cuda.Event()
                inside.record()
                inside.synchronize()
                waited = after.event.query()
            copy = combined.clone()
        torch.cuda.synchronize()
        assert same(copy.float(), _sum_of(one, group) * factor)
    assert not waited
    buffer.destroy()


def test_the_end_of_an_events_block_waits(gpu_ranks):
    gpu_ranks.run(2, _as_a_context)


def _beside_the_caller(group):
    """A call behind an event does not wait for what its caller's stream was given since."""
    buffer, streams = _buffer(group), _Streams()
    one = _inputs(group)
    rows, _, _, _, handle, _ = buffer.dispatch(**dispatch_arguments(buffer, one))
    for _ in range(2):  # as above
        torch.cuda.synchronize()
        torch.distributed.barrier(group)  # else one rank waits for the other's sleep
        with torch.cuda.stream(streams.caller):
            event = buffer.capture()
            torch.cuda._sleep(20 * CYCLES)
            slept = torch.cuda.Event()
            slept.record()
            combined, _, after = buffer.combine(rows, handle, previous_event=event,
                                                async_finish=True, allocate_on_comm_stream=True)
            after.event.synchronize()
            waited = slept.query()
        torch.cuda.synchronize()
        assert same(combined.float(), _sum_of(one, group))
    assert not waited
    buffer.destroy()


def test_calls_behind_an_event_run_beside_their_callers_stream(gpu_ranks):
    gpu_ranks.run(2, _beside_the_caller)


def _first_calls_beside_a_kernel(group):
    """A Buffer's first calls, which get memory and grow, do not wait for all kernels that run, as
    cudaFree does: one may be of another Buffer, and last until a rank that waits here goes on. What
    waits now and then test_callers._threads meets."""
    rank, size, side = group.rank(), group.size(), torch.cuda.Stream()
    one = _inputs(group, tokens=1024)
    few = test_low_latency.inputs_of(group, tokens=[9] * size)[rank]
    for _ in range(2):  # as above
        buffer = deep_ep.Buffer(group, 1 << 20)  # less than the rows take
        low_latency = test_low_latency.buffer_of(group)
        arguments = dispatch_arguments(buffer, one)
        torch.cuda.synchronize()
        torch.distributed.barrier(group)
        with torch.cuda.stream(side):
            torch.cuda._sleep(100 * CYCLES)
            slept = torch.cuda.Event()
            slept.record()
        rows, _, _, _, handle, _ = buffer.dispatch(**arguments)
        combined = buffer.combine(rows, handle)[0]
        rows, _, handle, _, _ = low_latency.low_latency_dispatch(
            few.x, few.topk_idx, test_low_latency.MAX_TOKENS, few.experts, use_fp8=False)
        few_combined = low_latency.low_latency_combine(rows, few.topk_idx, few.topk_weights,
                                                       handle)[0]
        torch.cuda.current_stream().synchronize()
        waited = slept.query()
        torch.cuda.synchronize()
        assert same(combined.float(), _sum_of(one, group))
        assert calc_diff(few_combined, weighted(few)) < 1e-5
        buffer.destroy()
        low_latency.destroy()
    assert not waited


def test_first_calls_wait_for_no_kernel(gpu_ranks):
    gpu_ranks.run(2, _first_calls_beside_a_kernel)
