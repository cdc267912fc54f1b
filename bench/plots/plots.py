"""Tables and plots of the documentation, made from the JSON files in bench/results.

plots.py writes docs/plots/*.svg, and in docs/*.md what stands between <!-- table NAME --> and
<!-- end -->; plots.py --check says what would change, and fails if anything would.
"""

import argparse
import difflib
import json
import re
import sys
from functools import partial
from pathlib import Path
from statistics import median

from chart import line_chart

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import gpu_goals  # noqa: E402

RESULTS = ROOT / "bench/results"
MACHINES = {"h100": "One H100, one rank", "h200-r2": "Two H200, a rank each"}
INTRANODE = {"h100": "2026-11-24_h100_r1.json", "h200-r2": "2026-11-29_h200_r2.json"}
LOW_LATENCY = {"h100": "2026-11-24_h100_low_latency_graph_r1.json",
               "h200-r2": "2026-11-30_h200_low_latency_graph_r2.json"}
NETWORK = "2026-11-28_host_network_n2.json"
INTERNODE = "2026-11-30_h200_internode_n2.json"
GOALS = [f"2026-11-30_h200_{name}.json" for name in (
    "r2", "r2_graph", "r2_small", "low_latency_graph_r2", "low_latency_given_fp8_r2",
    "internode_n2")]
LINK_GBPS = 383  # a copy engine, both GPUs at once, of two H100, whose links are the same
PLANS = {"uniform": "plan_uniform.json", "4 nodes a token": "plan_limited.json"}


def run_of(name):
    return json.loads((RESULTS / name).read_text())


def results_of(name):
    return run_of(name)["results"]


class Rows:
    """Results by the values of some of their fields."""

    def __init__(self, name, *fields):
        self._rows = {tuple(row[field] for field in fields): row for row in results_of(name)}

    def values(self, place):
        return sorted({key[place] for key in self._rows})

    def us(self, *key):
        return self._rows[key]["median_us"]

    def row(self, *key):
        return self._rows[key]


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# -- measured

def both(rows, sms, operation, value):
    return " / ".join(value(rows.row(sms, dtype, operation)) for dtype in ("bf16", "fp8"))


def intranode_rows(machine):
    return Rows(INTRANODE[machine], "num_sms", "dtype", "operation")


def intranode_table(machine):
    rows = intranode_rows(machine)
    lines = []
    for sms in rows.values(0):
        cells = [both(rows, sms, operation, lambda row: f"{row['median_us']:.0f}")
                 for operation in ("dispatch_cached", "dispatch", "pair_cached")]
        gbps = both(rows, sms, "dispatch_cached", lambda row: f"{row['logical_gbps']:.0f}")
        combine = f"{rows.us(sms, 'bf16', 'combine'):.0f}"
        lines.append([sms, cells[0], gbps, cells[1], combine, cells[2]])
    return table(["SMs", "dispatch BF16 / FP8, cached", "in GB/s, in and out each",
                  "notify + counts on the host + dispatch", "combine BF16", "cached pair"], lines)


def intranode_plot(machine):
    rows = intranode_rows(machine)
    line = lambda dtype, operation: [(sms, rows.us(sms, dtype, operation))
                                     for sms in rows.values(0)]
    lines = {"cached dispatch, BF16": line("bf16", "dispatch_cached"),
             "cached dispatch, FP8": line("fp8", "dispatch_cached"),
             "dispatch, BF16": line("bf16", "dispatch"), "dispatch, FP8": line("fp8", "dispatch"),
             "combine, BF16": line("bf16", "combine")}
    for dtype in ("bf16", "fp8"):
        row = rows.row(rows.values(0)[0], dtype, "dispatch_cached")
        if row["wire_gbps"] > 0:
            floor = row["median_us"] * row["wire_gbps"] / LINK_GBPS
            lines[f"link alone, {dtype.upper()}"] = [(sms, floor) for sms in rows.values(0)]
    return line_chart(f"{MACHINES[machine]}: 4096 tokens of 7168 values, top-8",
                      ("SMs", "us a call"), lines, log_x=len(rows.values(0)) > 4, log_y=False)


def low_latency_rows(machine):
    return Rows(LOW_LATENCY[machine], "tokens", "operation")


def low_latency_table(machine):
    rows = low_latency_rows(machine)
    return table(["T", "dispatch", "combine", "pair", "pair with hooks"], [
        [tokens] + [f"{rows.us(tokens, operation):.1f}"
                    for operation in ("dispatch", "combine", "pair", "pair_hook")]
        for tokens in rows.values(0)])


def low_latency_plot(machine):
    rows = low_latency_rows(machine)
    return line_chart(
        f"{MACHINES[machine]}: low latency, 7168 values, top-8", ("tokens", "us a call"),
        {name: [(tokens, rows.us(tokens, operation)) for tokens in rows.values(0)]
         for name, operation in (("dispatch", "dispatch"), ("combine", "combine"),
                                 ("pair", "pair"), ("pair with hooks", "pair_hook"))})


# -- predicted

def plan(name):
    return {(row["ranks"], row["operation"]): row for row in results_of(PLANS[name])}


def ranks_of(rows):
    return sorted({ranks for ranks, _ in rows})


def high_throughput_table():
    tables = [plan(name) for name in PLANS]
    lines = []
    for ranks in ranks_of(tables[0]):
        cells = [ranks, tables[0][ranks, "dispatch"]["experts"]]
        for rows in tables:
            dispatch, combine = rows[ranks, "dispatch"], rows[ranks, "combine"]
            cells += [f"{dispatch['nodes_per_token']:.1f}",
                      f"{dispatch['local_bytes']['busiest'] / 1e6:.0f} / "
                      f"{dispatch['network_bytes']['busiest'] / 1e6:.0f}",
                      f"{dispatch['network_messages']:.0f}",
                      f"{dispatch['total_us']:.0f} / {combine['total_us']:.0f}",
                      dispatch["bound"]]
        lines.append(cells)
    heads = ["nodes a token", "dispatch: MB inside / over the network", "messages",
             "dispatch / combine, us", "bound by"]
    return table(["ranks", "experts", *heads, *[f"limited: {head}" for head in heads]], lines)


def low_latency_plan_table():
    rows = plan("uniform")
    lines = []
    for ranks in ranks_of(rows):
        one, other = ([rows[ranks, f"{kind} {call}"] for call in ("dispatch", "combine")]
                      for kind in ("low-latency", "per-expert"))
        lines.append([
            ranks, one[0]["experts"], f"{one[0]['ranks_per_token']:.2f}",
            f"{one[0]['network_messages']:.0f} / {other[0]['network_messages']:.0f}",
            " / ".join(f"{call['total_us']:.0f}" for call in one),
            " / ".join(f"{call['total_us']:.0f}" for call in other),
            f"{one[0]['memory_bytes'] / 1e9:.2f}"])
    return table(["ranks", "experts", "ranks a token", "messages: a rank's / an expert's",
                  "a message for each rank: dispatch / combine, us",
                  "for each expert: dispatch / combine, us", "memory, GB"], lines)


def high_throughput_plot():
    return line_chart(
        "Predicted: 4096 tokens, FP8 there and BF16 back", ("ranks, 8 a node", "us a call"),
        {f"{call}, {name}": [(ranks, plan(name)[ranks, call]["total_us"])
                             for ranks in ranks_of(plan(name))]
         for call in ("dispatch", "combine") for name in PLANS})


def low_latency_plan_plot():
    rows = plan("uniform")
    return line_chart(
        "Predicted: low latency, 128 tokens", ("ranks, 8 a node", "us a call"),
        {f"{call}, {name}": [(ranks, rows[ranks, f"{kind} {call}"]["total_us"])
                             for ranks in ranks_of(rows)]
         for call in ("dispatch", "combine")
         for kind, name in (("low-latency", "a message a rank"), ("per-expert", "an expert"))})


def network_table():
    run = json.loads((RESULTS / NETWORK).read_text())
    theirs = median(run["ucp_put_bw_bytes_per_s"])
    lines = [["`ucx_perftest -t ucp_put_bw`", "", "", "", f"{theirs / 1e6:.0f}", "", ""]]
    for name in ("dispatch", "combine"):
        call = run[name]
        lines.append([name, call["records"][0], f"{call['record_bytes'][0] / 1e6:.1f}",
                      f"{median(call['seconds']) * 1e3:.0f}",
                      f"{median(call['bytes_per_s']) / 1e6:.0f}",
                      f"{run[name + '_vs_perftest']:.2f}", f"{max(call['veth_vs_plan']):.4f}"])
    return table(["", "records", "MB", "ms", "MB/s", "of `ucp_put_bw`",
                  "bytes of the devices / of the records, at most"], lines)


def internode_table():
    rows = Rows(INTERNODE, "num_sms", "tokens", "operation")
    lines = []
    for sms in rows.values(0):
        calls = [rows.row(sms, 4096, name) for name in ("dispatch_cached", "combine")]
        cells = [sms, f"{calls[0]['put_gbps']:.0f}"]
        for call in calls:
            share = f"{100 * call['node_vs_put']:.2f} %"
            cells += [f"{call['median_us']:.0f}", f"{call['node_gbps']:.0f}",
                      share if call["node_vs_put"] >= gpu_goals.LEAST_VS_PUT else f"**{share}**"]
        counted = rows.row(sms, 4096, "dispatch")
        small = [f"{rows.us(sms, 1, name):.0f}" for name in ("dispatch_cached", "combine")]
        lines.append([*cells, f"{counted['median_us']:.0f}, {100 * counted['node_vs_put']:.1f} %",
                      " / ".join(small)])
    return table(["SMs", "puts, GB/s", "dispatch with a handle, us", "GB/s", "of puts",
                  "combine, us", "GB/s", "of puts", "dispatch that waits for counts, us, of puts",
                  "T=1: dispatch / combine, us"], lines)


TABLES = {"network-exchange": network_table, "h200-internode": internode_table,
          "h200-goals": lambda: gpu_goals.table(map(run_of, GOALS)),
          "plan-high-throughput": high_throughput_table, "plan-low-latency": low_latency_plan_table}
PLOTS = {"plan_high_throughput": high_throughput_plot, "plan_low_latency": low_latency_plan_plot}
for name in MACHINES:
    TABLES[f"{name}-intranode"] = partial(intranode_table, name)
    TABLES[f"{name}-low-latency"] = partial(low_latency_table, name)
    PLOTS[f"{name.replace('-', '_')}_intranode"] = partial(intranode_plot, name)
    PLOTS[f"{name.replace('-', '_')}_low_latency"] = partial(low_latency_plot, name)


def filled(text, used):
    """`text` with its tables made anew."""
    def fill(match):
        used.add(match[1])
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


def outputs():
    """What should be in which file."""
    used = set()
    wanted = {ROOT / f"docs/plots/{name}.svg": make() for name, make in PLOTS.items()}
    for page in sorted((ROOT / "docs").glob("*.md")):
        wanted[page] = filled(page.read_text(), used)
    if missing := set(TABLES) - used:
        raise SystemExit(f"no page has a place for the tables {', '.join(sorted(missing))}")
    return wanted


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if files differ")
    check = parser.parse_args().check
    stale = []
    for path, text in outputs().items():
        found = path.read_text() if path.exists() else ""
        if found == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if check:
            sys.stdout.writelines(difflib.unified_diff(
                found.splitlines(True), text.splitlines(True), stale[-1], "as it should be", n=0))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if stale:
        print(("not what bench/plots/plots.py makes: " if check else "written: ")
              + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
