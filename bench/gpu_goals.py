"""What bench/gpu.sh measured beside what is wanted: gpu_goals.py FOLDER... (or JSON files) prints a
table of the medians of the slowest rank, in microseconds, and what calls found wrong. Of H200s,
H=7168, top-8 of 256."""

import json
import sys
from pathlib import Path

HIGH = {"hidden": 7168, "topk": 8, "experts": 256}
# Operations whose sum a figure is.
CACHED, COMBINE, COUNTED = ("dispatch_cached",), ("combine",), ("layout", "dispatch")


def high(operations, dtype, sms, tokens=4096):
    """Of any number of SMs if that is None."""
    return operations, {**HIGH, "tokens": tokens, "dtype": dtype, "num_sms": sms}


def low(operation, tokens, max_tokens, given=False):
    kind = {"payload": "scaled-fp8", "format": "rank-major"} if given else \
        {"payload": "fp8", "format": "expert-major"}
    return (operation,), {**HIGH, **kind, "wire": "bf16", "mode": "graph", "tokens": tokens,
                          "max_tokens": max_tokens}


def pairs(wanted, given=False):
    name = "FP8 given, rank-major" if given else "quantised, expert-major"
    for most in (256, None):
        for tokens, us in zip((1, 16, 32, 64, 128, 256), wanted):
            yield (f"low latency, {name}, pair, T={tokens}, M={most or 'T'}", us,
                   *low("pair", tokens, most or tokens, given))


GOALS = {
    2: [("cached dispatch FP8, 16 SMs", 97, *high(CACHED, "fp8", 16)),
        ("cached dispatch BF16, 16 SMs", 190, *high(CACHED, "bf16", 16)),
        ("combine BF16, 20 SMs", 215, *high(COMBINE, "bf16", 20)),
        ("layout + dispatch that waits for counts, BF16, 16 SMs", 215,
         *high(COUNTED, "bf16", 16)),
        ("cached dispatch FP8, 8 SMs", 160, *high(CACHED, "fp8", 8)),
        ("cached dispatch BF16, 8 SMs", 300, *high(CACHED, "bf16", 8)),
        ("combine BF16, 8 SMs", 400, *high(COMBINE, "bf16", 8)),
        ("pair in a graph, BF16", 350, *high(("pair_cached_graph",), "bf16", None)),
        ("pair in a graph, FP8", 270, *high(("pair_cached_graph",), "fp8", None)),
        ("dispatch in a graph, T=128", 15, *high(("dispatch_cached_graph",), "bf16", None, 128)),
        ("combine in a graph, T=128", 15, *high(("combine_graph",), "bf16", None, 128)),
        ("low latency, dispatch, T=1", 4.5, *low("dispatch", 1, 256)),
        ("low latency, combine, T=1", 6, *low("combine", 1, 256)),
        *pairs((11, 12, 13, 15, 20, 33)), *pairs((9, 10, 10.5, 12, 16, 25), given=True)],
    4: [("cached dispatch FP8, 16 SMs", 245, *high(CACHED, "fp8", 16)),
        ("cached dispatch BF16, 16 SMs", 470, *high(CACHED, "bf16", 16)),
        ("combine BF16, 20 SMs", 475, *high(COMBINE, "bf16", 20)),
        ("layout + dispatch that waits for counts, BF16, 16 SMs", 500,
         *high(COUNTED, "bf16", 16)),
        *pairs((14, 17, 20, 24, 33, 58))],
}


def median_us(results, operations, wanted):
    """Of the number of SMs that takes least; None if an operation was not measured."""
    sums = {}
    for row in results:
        if row["operation"] in operations and all(
                row.get(key) == value for key, value in wanted.items() if value is not None):
            sums.setdefault(row.get("num_sms"), {})[row["operation"]] = row["median_us"]
    return min((sum(one.values()) for one in sums.values() if len(one) == len(operations)),
               default=None)


def table(runs):
    """Of runs on GPUs of one node; what none of them measured is left out."""
    runs = [run for run in runs if run["command"] in ("bench intranode", "bench low-latency")
            and (run["args"]["backend"], run["args"]["nodes"]) == ("cuda", 1)]
    lines = ["| ranks | figure | us | wanted | |", "|---|---|---|---|---|"]
    for ranks, goals in GOALS.items():
        results = [row for run in runs if run["args"]["ranks"] == ranks for row in run["results"]]
        for name, wanted, operations, match in goals:
            us = median_us(results, operations, match)
            if us is not None:
                lines.append(f"| {ranks} | {name} | {us:.1f} | {wanted} | "
                             f"{'met' if us <= wanted else 'missed'} |")
    return "\n".join(lines)


def main(names):
    files = [file for path in map(Path, names)
             for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    runs = [json.loads(file.read_text()) for file in files]
    print(table(runs))
    print(f"\n{len(runs)} runs, {sum(run.get('wrong_elements', 0) for run in runs)} wrong elements")


if __name__ == "__main__":
    main(sys.argv[1:])
