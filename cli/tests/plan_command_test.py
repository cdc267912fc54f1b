"""`deepep plan` as it is called: plan_command_test.py DEEPEP. What bench/results has of it is what
it says now."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEEPEP = sys.argv.pop()
KEPT = {"plan_uniform.json": [], "plan_limited.json": ["--routing", "limited", "--max-nodes", "4"]}


def run(*arguments):
    return subprocess.run([DEEPEP, "plan", *arguments], capture_output=True, text=True)


def near(found, wanted):
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(near(found[key], wanted[key])
                                                     for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(near, found, wanted))
    if isinstance(wanted, (int, float)):
        return abs(found - wanted) <= 1e-6 * abs(wanted)
    return found == wanted


class Plan(unittest.TestCase):
    def json_of(self, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            done = run(*arguments, "--json", file)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(file.read_text()), done.stdout

    def test_what_is_kept_is_what_it_says(self):
        for name, arguments in KEPT.items():
            found, _ = self.json_of(*arguments)
            kept = json.loads((ROOT / "bench/results" / name).read_text())
            how = (f"make it anew: deepep plan {' '.join(arguments)} --json bench/results/{name}, "
                   "then bench/plots/plots.py; docs/scaling.md draws conclusions from it")
            self.assertTrue(near(found["results"], kept["results"]), how)
            self.assertTrue(near(found["args"], kept["args"]), how)

    def test_bytes_are_those_that_benchmarks_counted(self):
        counted = {}
        for name in ("2026-11-24_h100_r1.json", "2026-11-24_h100_low_latency_graph_r1.json"):
            for row in json.loads((ROOT / "bench/results" / name).read_text())["results"]:
                key = row["operation"], row.get("dtype", row.get("payload")), row["tokens"]
                counted[key] = row["logical_bytes_per_rank"]
        one_rank = ("--nodes", "1", "--ranks-per-node", "1")
        for dtype, row_bytes in (("bf16", 2 * 7168), ("fp8", 7168 + 4 * 56)):
            found = self.json_of(*one_rank, "--dtype", dtype)[0]["results"]
            rows = found[1]["received_rows"]["mean"]
            self.assertEqual(rows * row_bytes, counted["dispatch_cached", dtype, 4096])
            self.assertEqual(found[1]["row_bytes"], row_bytes + 12 * 8 + 4)
        for tokens in (1, 16, 256):
            rows = self.json_of(*one_rank, "--ll-tokens", str(tokens))[0]["results"]
            for row, call, row_bytes in ((rows[5], "dispatch", 7168 + 4 * 56),
                                         (rows[6], "combine", 2 * 7168)):  # for each expert
                payload = row["own_bytes"] * row_bytes / row["row_bytes"]
                self.assertAlmostEqual(payload, counted[call, "fp8", tokens], delta=0.01)

    def test_bytes_between_nodes_are_those_that_benchmarks_counted(self):
        hosts = json.loads((ROOT / "bench/results/2026-11-28_host_network_n2.json").read_text())
        two_by_two, _ = self.json_of("--nodes", "2", "--ranks-per-node", "2", "--dtype", "bf16")
        notify, dispatch, combine = two_by_two["results"][:3]
        for kind, call in (("dispatch", dispatch), ("combine", combine)):
            records, sent = sum(hosts[kind]["records"]), sum(hosts[kind]["record_bytes"])
            expected = call["network_bytes"]["mean"] / call["network_row_bytes"]
            self.assertAlmostEqual(expected / (records / 4), 1, delta=1e-3)
            # Those of the benchmark carry no topk, since they are by handle: 96 bytes, and as they
            # are multiples of 64 bytes they are shorter by one of these.
            topk = 64 if kind == "dispatch" else 0
            self.assertEqual(call["network_row_bytes"] - topk, sent / records)
        self.assertEqual(notify["network_messages"], 1)

        gpus = json.loads((ROOT / "bench/results/2026-11-30_h200_internode_n2.json").read_text())
        two_by_one, _ = self.json_of("--nodes", "2", "--ranks-per-node", "1", "--dtype", "bf16")
        for row in gpus["results"]:
            call = {"dispatch_cached": 1, "combine": 2}.get(row["operation"])
            if call is None or row["tokens"] != 4096:
                continue
            plan = two_by_one["results"][call]
            rows = plan["network_bytes"]["mean"] / plan["network_row_bytes"]
            self.assertAlmostEqual(rows * 2 * 7168 / row["wire_bytes_per_rank"], 1, delta=1e-3)
            every = plan["ranks_per_token"] * 4096 * 2 * 7168
            self.assertAlmostEqual(every / row["logical_bytes_per_rank"], 1, delta=1e-3)

    def test_what_no_buffer_takes_is_said(self):
        most = "64 nodes of 64 ranks at most"
        self.assertNotIn(most, self.json_of("--nodes", "64")[1])
        self.assertIn(most, self.json_of("--nodes", "1,128")[1])

    def test_memory_knows_the_nodes(self):
        """More nodes of fewer ranks have more rings each."""
        memory = [self.json_of("--nodes", nodes, "--ranks-per-node", ranks)[0]["results"][2][
            "memory_bytes"] for nodes, ranks in (("2", "8"), ("4", "4"), ("8", "2"))]
        self.assertLess(memory[0] + (4 << 20), memory[1])
        self.assertLess(memory[1] + (8 << 20), memory[2])

    def test_there_is_a_line_for_each_result(self):
        found, text = self.json_of("--nodes", "1,3", "--ranks-per-node", "4", "--experts", "24")
        self.assertEqual(len(found["results"]), 14)
        self.assertEqual(len(text.splitlines()), 14 + 3)
        self.assertEqual({row["ranks"] for row in found["results"]}, {4, 12})

    def test_routing_is_read_or_drawn(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "topk.txt"
            file.write_text("0 1\n-1 3\n")  # ranks 0 and, once, 1
            found, _ = self.json_of("--nodes", "1", "--ranks-per-node", "2", "--experts", "4",
                                    "--tokens", "2", "--routing", "file", "--routing-file", file)
        rows = found["results"][1]["received_rows"]
        self.assertEqual((rows["mean"], rows["busiest"]), (2, 2))
        even, skewed = (self.json_of("--nodes", "1", "--topk", "1", "--routing", "zipf",
                                     "--skew", skew)[0]["results"][1] for skew in ("1", "2"))
        self.assertGreater(skewed["received_rows"]["busiest"], even["received_rows"]["busiest"])

    def test_what_is_not_allowed_is_named(self):
        for arguments, words in (
                (["--routing", "limited"], "--max-nodes"), (["--max-nodes", "2"], "limited"),
                (["--routing", "even"], "'even'"), (["--routing", "file"], "--routing-file"),
                (["--dtype", "int3"], "'int3'"), (["--network-gbps", "0"], "--network-gbps is 0"),
                (["--nodes", "3"], "experts is 256"), (["--chunk-rows", "0"], "--chunk-rows is 0"),
                (["--json", "/no/such/folder/file"], "/no/such/folder/file")):
            done = run(*arguments)
            self.assertEqual(done.returncode, 1, arguments)
            self.assertIn(words, done.stderr)


if __name__ == "__main__":
    unittest.main()
