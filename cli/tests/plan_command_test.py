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
