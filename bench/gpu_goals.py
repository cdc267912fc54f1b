"""What bench/gpu.sh measured beside what is wanted: gpu_goals.py FOLDER... (or JSON files) prints a
table of the medians of the slowest rank, in microseconds, and what calls found wrong. Of H200s,
H=7168, top-8 of 256."""

import json
import sys
from pathlib import Path

HIGH = {"hidden": 7168, "topk": 8, "experts": 256}
LEAST_VS_PUT = 0.6
# Operations whose sum a figure is.
CACHED, COMBINE, COUNTED = ("dispatch_cached",), ("combine",), ("layout", "dispatch")


def high(operations, dtype, sms, tokens=4096):
    """In chains of calls from a stream of the caller's; in a graph if `sms` is None, and then of
    the number of SMs that takes least."""
    match = {**HIGH, "tokens": tokens, "dtype": dtype}
    return operations, match if sms is None else {**match, "num_sms": sms, "comm_stream": False}


def low(operation, tokens, max_tokens, given=False):
    kind = {"payload": "scaled-fp8", "format": "rank-major"} if given else \
        {"payload": "fp8", "format": "expert-major"}
    return (operation,), {**HIGH, **kind, "wire": "bf16", "mode": "graph", "tokens": tokens,
                          "max_tokens": max_tokens}


def pairs(wanted, given=False):
    name = "FP8 given, rank-major" if given else "quantised, expert-major"
    for most in (256, None):
        for tokens, us in zip((1, 16, 32, 64, 128, 256), wanted):
            if most is None and tokens == 256:
                continue
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


def best(runs, operations, wanted):
    """Least sum of the operations' medians in one run, and its number of SMs, None in low latency.
    None if no run measured all of them."""
    found = []
    for run in runs:
        sums = {}
        for row in run["results"]:
            known = {**run["args"], **row}
            if row["operation"] in operations and all(
                    known.get(key) == value for key, value in wanted.items()):
                sums.setdefault(row.get("num_sms"), {})[row["operation"]] = row["median_us"]
        found += [(sum(one.values()), sms) for sms, one in sums.items()
                  if len(one) == len(operations)]
    return min(found, key=lambda one: one[0], default=None)


def between_nodes(runs):
    """Lines for what two nodes of one rank reach of the puts by as many SMs in the same run."""
    for run in runs:
        if run["command"] != "bench internode" or run["args"]["ranks"] != 2:
            continue
        rows = {(row["operation"], row["num_sms"]): row for row in run["results"]
                if row["tokens"] == 4096 and row["dtype"] == "bf16" and "node_vs_put" in row}
        for operation in ("dispatch_cached", "combine"):
            shares = {sms: row["node_vs_put"] for (name, sms), row in rows.items()
                      if name == operation}
            if shares:
                sms = max(shares, key=shares.get)
                yield (f"| 2 | between two nodes, {operation}, {sms} SMs reached most | "
                       f"{100 * shares[sms]:.1f} % of puts | {100 * LEAST_VS_PUT:.0f} % | "
                       f"{'met' if shares[sms] >= LEAST_VS_PUT else 'missed'} |")


def table(runs):
    """Of runs on GPUs; what none of them measured is left out."""
    runs = [run for run in runs if isinstance(run, dict) and "backend" in run.get("args", ())
            and run["args"]["backend"] == "cuda"]
    lines = ["| ranks | figure | us | wanted | |", "|---|---|---|---|---|"]
    for ranks, goals in GOALS.items():
        of_ranks = [run for run in runs if run["args"]["ranks"] == ranks
                    and run["command"] in ("bench intranode", "bench low-latency")
                    and run["args"].get("nodes", 1) == 1]
        for name, wanted, operations, match in goals:
            if found := best(of_ranks, operations, match):
                us, sms = found
                chosen = f", {sms} SMs took least" if sms and "num_sms" not in match else ""
                lines.append(f"| {ranks} | {name}{chosen} | {us:.1f} | {wanted} | "
                             f"{'met' if us <= wanted else 'missed'} |")
    return "\n".join([*lines, *between_nodes(runs)])


def main(names):
    files = [file for path in map(Path, names)
             for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    runs = [json.loads(file.read_text()) for file in files]
    print(table(runs))
    wrong = sum(run["wrong_elements"] for run in runs if "wrong_elements" in run)
    print(f"\n{len(runs)} runs, {wrong} wrong elements")


if __name__ == "__main__":
    main(sys.argv[1:])
