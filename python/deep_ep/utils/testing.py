"""Timers that test programs written for DeepEP use. Needs torch, and a GPU for bench_kineto."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_FLUSH_BYTES = 256 << 20  # more than any L2 holds


def bench(fn: Callable[[], Any], num_warmups: int = 50, num_tests: int = 50,
          post_fn: Callable[[], Any] | None = None) -> tuple[float, float, float]:
    """Seconds of fn() on the current stream (on the host: of the calling thread), with a cold L2;
    `post_fn` runs behind each call, untimed. Returns (mean, least, most) of all but the first."""
    on_gpu = torch.cuda.is_available()
    for _ in range(num_warmups):
        fn()
    flush = torch.empty(_FLUSH_BYTES if on_gpu else 0, dtype=torch.int8,
                        device="cuda" if on_gpu else "cpu")
    times, events = [], []
    for _ in range(num_tests):
        flush.zero_()
        if on_gpu:
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            fn()
            events[-1][1].record()
        else:
            begin = time.perf_counter()
            fn()
            times.append(time.perf_counter() - begin)
        if post_fn is not None:
            post_fn()
    if on_gpu:
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    times = times[1:] or times
    return sum(times) / len(times), min(times), max(times)


def _durations(profiler, name, num_kernels_per_period):
    """Mean seconds of the kernels whose name contains `name`; with several a period, of each."""
    kernels = [event for event in profiler.events()
               if event.device_type == torch.autograd.DeviceType.CUDA and name in event.name]
    if not kernels or len({event.name for event in kernels}) != 1:
        raise RuntimeError(f"kernels named {name!r}: one is expected, found are "
                           f"{sorted({event.name for event in kernels})}")
    if len(kernels) % num_kernels_per_period:
        raise RuntimeError(f"{len(kernels)} kernels named {name!r} are no multiple of "
                           f"{num_kernels_per_period}")
    kernels.sort(key=lambda event: event.time_range.start)
    seconds = [event.time_range.elapsed_us() / 1e6 for event in kernels]
    means = [sum(seconds[phase::num_kernels_per_period]) /
             len(seconds[phase::num_kernels_per_period])
             for phase in range(num_kernels_per_period)]
    return means if num_kernels_per_period > 1 else means[0]


def bench_kineto(fn: Callable[[], Any], kernel_names: str | tuple[str, ...], num_tests: int = 30,
                 suppress_kineto_output: bool = False, trace_path: str | None = None,
                 barrier_comm_profiling: bool = False,
                 num_kernels_per_period: int = 1) -> Any:
    """Seconds of kernels inside fn(), found by a part of their name in torch's profiler: of one
    name a number, of a tuple a tuple; with `num_kernels_per_period` > 1 lists of the phases.
    `barrier_comm_profiling`: all ranks of the default group begin each call together."""
    del suppress_kineto_output  # nothing is printed
    from torch.profiler import ProfilerActivity, profile
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    together = torch.ones(1, dtype=torch.float32, device="cuda")

    def run():
        for _ in range(num_tests):
            flush.zero_()
            if barrier_comm_profiling:
                torch.cuda._sleep(20_000_000)  # hides how far apart the hosts are
                dist.all_reduce(together)
            fn()
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    found = tuple(_durations(profiler, name, num_kernels_per_period) for name in names)
    return found[0] if isinstance(kernel_names, str) else found
