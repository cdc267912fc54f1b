#!/usr/bin/env python3
"""What `deepep bench` measures on GPUs, through Python: the same calls, chains and names, so that
its JSON can be laid beside (`--beside`), and what a call takes of the host until it is queued,
alone with `--host-only`, in some seconds.

One process a GPU, started by hand or by torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""

import argparse
import collections
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

import deep_ep

HIDDEN, TOPK, EXPERTS = 7168, 8, 256
LIVE_RESULTS = 5
CHAIN = 100
ROWS_IN_GRAPHS = 20 << 12  # a graph keeps the results of all of its calls


def host_us(call, stream, repeats=400):
    """Median time of `call` on the host, calls that are only queued."""
    times = []
    with torch.cuda.stream(stream):
        for n in range(repeats):
            if n % 50 == 0:
                torch.cuda.synchronize()  # no full queue is waited for
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def quantized(x):
    """FP8 of groups of 128 values, and their scales."""
    groups = x.float().view(x.shape[0], -1, 128)
    amax = groups.abs().amax(2).clamp(1e-4)
    most = torch.full_like(amax, 448.0)  # dividing by, or a number, is not exact on GPUs
    values = (groups * (most / amax).unsqueeze(2)).to(torch.float8_e4m3fn)
    return values.view(x.shape), amax / most


def widened(x):
    if not isinstance(x, tuple):
        return x.float()
    values, scales = x
    return (values.float().view(*scales.shape, 128) * scales.unsqueeze(-1)).view(values.shape)


class Bench:
    """Times are of the slowest rank, in us a call."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29531")
        torch.cuda.set_device(self.rank % torch.cuda.device_count())
        dist.init_process_group("gloo", rank=self.rank, world_size=self.size)
        self.group = dist.group.WORLD
        self.random = torch.Generator().manual_seed(1 + self.rank)
        self.rows = []

    def inputs(self, tokens):
        ids = torch.rand((tokens, EXPERTS), generator=self.random).topk(TOPK, dim=1).indices
        weights = torch.rand((tokens, TOPK), generator=self.random)
        x = torch.randn((tokens, HIDDEN), generator=self.random).bfloat16()
        return x.cuda(), ids.cuda(), weights.cuda()

    def times_of(self, run, chain, iters=11, warmup=2, behind=False):
        """Medians of chains; run() is one chain. `behind`: of one that follows another, as
        `deepep bench` times graphs: what the host takes to launch one is not seen then."""
        for _ in range(warmup):
            run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(iters):
            torch.cuda.synchronize()
            dist.barrier(self.group)
            if behind:
                run()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / chain)
        everyone = [None] * self.size
        dist.all_gather_object(everyone, times, group=self.group)
        return statistics.median(max(one) for one in zip(*everyone))

    def time_graph(self, call, chain):
        torch.cuda.synchronize()
        dist.barrier(self.group)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(chain):
                call()
        return self.times_of(graph.replay, chain, warmup=20, behind=True)

    def add(self, operation, median, wrong=0, **shape):
        self.rows.append({"operation": operation, "median_us": median, "wrong_elements": wrong,
                          "hidden": HIDDEN, "topk": TOPK, "experts": EXPERTS, **shape})

    def add_host(self, calls, buffer, wrong, **shape):
        """What calls take of the host, on the Buffer's own stream and on one of the caller's."""
        own = torch.cuda.Stream()
        for name, call in calls:
            self.add(f"{name} host", host_us(call, buffer.get_comm_stream()), wrong, **shape)
            self.add(f"{name} host, own stream", host_us(call, own), wrong, **shape)

    # --- high throughput

    def intranode(self, tokens, dtype, num_sms):
        deep_ep.Buffer.set_num_sms(num_sms)
        config = deep_ep.Config(num_sms)
        buffer = deep_ep.Buffer(self.group,
                                config.get_nvl_buffer_size_hint(2 * HIDDEN, self.size))
        x, ids, weights = self.inputs(tokens)
        sent = quantized(x) if dtype == "fp8" else x
        live = collections.deque(maxlen=LIVE_RESULTS)
        shape = {"tokens": tokens, "dtype": dtype, "num_sms": num_sms}

        def layout():
            return buffer.get_dispatch_layout(ids, EXPERTS)

        def dispatch(found):
            live.append(buffer.dispatch(
                sent, num_tokens_per_rank=found[0], is_token_in_rank=found[3],
                num_tokens_per_expert=found[2], topk_idx=ids, topk_weights=weights,
                config=config))
            return live[-1]

        first = dispatch(layout())
        y = widened(first[0]).bfloat16()
        handle = first[4]
        found = layout()

        def cached():
            live.append(buffer.dispatch(sent, handle=handle, config=config))

        def combine():
            return buffer.combine(y, handle, topk_weights=first[2], config=config)[0]

        def cached_pair():
            cached()
            combine()

        def layout_pair():
            got = dispatch(layout())
            buffer.combine(y, got[4], topk_weights=first[2], config=config)

        def chain(call):
            def run():
                for _ in range(CHAIN):
                    call()
            return run

        timed = (("layout", layout), ("dispatch", lambda: dispatch(found)),
                 ("dispatch_cached", cached), ("combine", combine), ("pair_cached", cached_pair),
                 ("layout_pair", layout_pair))
        times = [] if self.arguments.host_only else [
            (name, self.times_of(chain(call), CHAIN)) for name, call in timed]
        live.clear()
        graphs = [] if self.arguments.host_only else [
            (f"{name}_graph", self.time_graph(call, min(CHAIN, ROWS_IN_GRAPHS // tokens)))
            for name, call in timed if name in ("dispatch_cached", "combine", "pair_cached")]
        # Every rank that a token went to brings the same row back.
        ranks = found[3].sum(1, keepdim=True)
        cached()
        y = widened(live[-1][0]).bfloat16()
        wrong = int((combine() != (ranks * widened(sent).bfloat16().float()).bfloat16()).sum())
        for name, median in times + graphs:
            self.add(name, median, wrong, **shape)
        self.add_host((("dispatch_cached", cached), ("combine", combine)), buffer, wrong, **shape)
        live.clear()
        buffer.destroy()

    # --- low latency

    def low_latency(self, tokens):
        most = tokens
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, HIDDEN, self.size, EXPERTS)
        buffer = deep_ep.Buffer(self.group, 0, hint, low_latency_mode=True)
        x, ids, weights = self.inputs(tokens)
        shape = {"tokens": tokens, "max_tokens": most, "payload": "fp8", "format": "expert-major",
                 "wire": "bf16"}

        def dispatch():
            return buffer.low_latency_dispatch(x, ids, most, EXPERTS, use_fp8=True)

        got = dispatch()
        y = widened((got[0][0], got[0][1].contiguous())).bfloat16()

        out = torch.empty_like(x)

        def combine():
            return buffer.low_latency_combine(y, ids, weights, got[2])[0]

        def combine_out():
            return buffer.low_latency_combine(y, ids, weights, got[2], out=out)[0]

        def pair():
            dispatch()
            combine()

        # A row has one value for all its experts, so sums lose what bfloat16 does, twice.
        exact = widened(quantized(x)).bfloat16().float() * weights.sum(1, keepdim=True)
        wrong = sum(int(((call().float() - exact).abs() > 0.01 * exact.abs()).sum())
                    for call in (combine, combine_out))
        chained = (("dispatch", dispatch), ("combine", combine), ("pair", pair))
        for name, call in () if self.arguments.host_only else chained:
            self.add(name, self.time_graph(call, CHAIN), wrong, mode="graph", **shape)
        self.add_host((("ll_dispatch", dispatch), ("ll_combine", combine),
                       ("ll_combine out=", combine_out)), buffer, wrong, mode="eager", **shape)
        buffer.destroy()

    def finish(self):
        """Prints and writes; True if everything is right."""
        beside = {}
        for file in self.arguments.beside:
            with open(file, encoding="utf-8") as text:
                for row in json.load(text)["results"]:
                    beside[key_of(row)] = row["median_us"]
        print(f"{'call':34}{'tokens':>8}  {'':12}{'us':>9}{'C++':>9}{'ratio':>7}{'wrong':>7}")
        for row in self.rows:
            what = row.get("mode") or f"{row['dtype']} {row['num_sms']} SMs"
            native = beside.get(key_of(row))
            if native is not None:
                row["native_median_us"] = native
            more = f"{native:9.1f}{row['median_us'] / native:7.2f}" if native else " " * 16
            print(f"{row['operation']:34}{row['tokens']:8}  {what:12}{row['median_us']:9.1f}{more}"
                  f"{row['wrong_elements']:7}")
        if self.arguments.json:
            report = {"command": "python_calls.py", "version": deep_ep.__version__,
                      "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                      "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                      "ranks": self.size, "chain": CHAIN, "results": self.rows}
            with open(self.arguments.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
        return all(row["wrong_elements"] == 0 for row in self.rows)


def key_of(row):
    return tuple(row.get(name) for name in ("operation", "tokens", "max_tokens", "dtype", "num_sms",
                                            "payload", "format", "wire", "mode"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", help="default 128 and 4096")
    parser.add_argument("--dtype", nargs="*", choices=["bf16", "fp8"], help="default both")
    parser.add_argument("--num-sms", type=int, default=16)
    parser.add_argument("--low-latency-tokens", type=int, nargs="*", help="default 1 and 128")
    parser.add_argument("--host-only", action="store_true",
                        help="only until calls are queued; of 128 tokens in bf16 by default")
    parser.add_argument("--beside", nargs="*", default=[], help="JSON of deepep bench")
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    for name, all_of_it, few in (("tokens", [128, 4096], [128]),
                                 ("dtype", ["bf16", "fp8"], ["bf16"]),
                                 ("low_latency_tokens", [1, 128], [128])):
        if getattr(arguments, name) is None:
            setattr(arguments, name, few if arguments.host_only else all_of_it)
    bench = Bench(arguments)
    for tokens in arguments.tokens:
        for dtype in arguments.dtype:
            bench.intranode(tokens, dtype, arguments.num_sms)
    for tokens in arguments.low_latency_tokens:
        bench.low_latency(tokens)
    good = bench.finish() if bench.rank == 0 else True
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
