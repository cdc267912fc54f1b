"""`deepep info`, `verify` and `bench intranode` as they are called: commands_test.py DEEPEP."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from command_runs import DEEPEP, main, start, variables

ROOT = Path(__file__).resolve().parents[2]
SMALL_BENCH = {"--ranks": 2, "--tokens": 4, "--hidden": 64, "--experts": 24, "--iters": 3,
               "--warmup": 1}


def run(*arguments, before=(), **more):
    return subprocess.run([*before, DEEPEP, *map(str, arguments)], env=variables(**more),
                          capture_output=True, text=True, timeout=120)


def bench(*flags):
    """A small bench intranode; flags with values, which take the place of its own."""
    options = {**SMALL_BENCH, **dict(zip(flags[::2], flags[1::2]))}
    return ["bench", "intranode", *(str(word) for option in options.items() for word in option)]


def children_of(process, count):
    """The ranks of a running command, by number."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(1000):
        pids = [int(pid) for pid in file.read_text().split()]
        if len(pids) == count:
            return pids
        time.sleep(0.01)
    raise AssertionError(f"{pids} instead of {count} ranks")


def segments_of(pid):
    """Files of a rank's memory: the first has control words, those behind it results only."""
    def is_segment(path):
        try:
            return "memfd:deep_ep" in os.readlink(path)
        except FileNotFoundError:  # closed meanwhile
            return False
    return sorted(filter(is_segment, Path(f"/proc/{pid}/fd").iterdir()),
                  key=lambda path: int(path.name))


def left_in_shm():
    return sorted(path.name for path in Path("/dev/shm").iterdir() if "deep_ep" in path.name)


class Commands(unittest.TestCase):
    def check_passes(self, done):
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def check_refused(self, *arguments, words):
        done = run(*arguments)
        self.assertNotEqual(done.returncode, 0, arguments)
        self.assertIn(words, done.stderr, arguments)


class Info(Commands):
    def test_each_part_that_is_off_says_why(self):
        found = json.loads(self.check_passes(run("info", "--json")))
        self.assertTrue(found["backends"]["host"]["on"])
        self.assertTrue(found["transports"]["shared memory"]["on"])
        self.assertLessEqual({"cuda"}, found["backends"].keys())
        self.assertLessEqual({"reading peers", "NVSHMEM", "UCX"}, found["transports"].keys())
        text = self.check_passes(run("info"))
        for name, part in {**found["backends"], **found["transports"]}.items():
            self.assertGreater(len(part["why"]), 3, name)
            self.assertRegex(text, rf"{name} +{'on' if part['on'] else 'off'} +\S")

    def test_every_variable_has_its_value_and_secrets_stay_secret(self):
        text = self.check_passes(run("info", "--env", DEEP_EP_TIMEOUT_MS="1234",
                                     DEEP_EP_RENDEZVOUS_SECRET="sesame"))
        self.assertIn("DEEP_EP_TIMEOUT_MS = 1234  (default 100000)", text)
        self.assertIn("DEEP_EP_RENDEZVOUS_SECRET = (set)", text)
        self.assertNotIn("sesame", text)
        documented = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs/env.md").read_text(), re.M)
        self.assertEqual(re.findall(r"^  ([A-Z_]+) = ", text, re.M), documented)


class Verify(Commands):
    def test_the_covering_set_passes_on_one_to_eight_ranks(self):
        for ranks in range(1, 9):
            text = self.check_passes(run("verify", "--ranks", ranks))
            self.assertRegex(text, rf"\n[1-9]\d* passed, 0 failed on {ranks} ranks\n")

    def test_a_shape_by_flags_is_one_case(self):
        for flags in (("--tokens", "5,0,9", "--dtype", "fp8", "--routing", "holes", "--grouped"),
                      ("--hidden", "16", "--dtype", "bytes", "--experts", "3", "--topk", "3"),
                      ("--routing", "zipf", "--async", "--seed", "7"), ("--prepare",)):
            self.assertIn("1 passed, 0 failed on 3 ranks",
                          self.check_passes(run("verify", "--ranks", 3, *flags)))

    def test_impossible_shapes_are_refused_by_name(self):
        for flags, words in ((("--experts", "7"), "experts = 7"),
                             (("--hidden", "3"), "hidden = 3"),
                             (("--topk", "0"), "topk = 0"),
                             (("--tokens", "1,2"), "tokens"),
                             (("--dtype", "float"), "'float'"),
                             (("--routing", "random"), "'random'"),
                             (("--hiden", "16"), "--hiden")):
            self.check_refused("verify", "--ranks", "3", *flags, words=words)
        self.check_refused("verify", "--ranks", "-1", words="--ranks -1")

    def test_memory_of_ranks_does_not_lie_in_dev_shm(self):
        small = ("unshare", "--mount", "sh", "-c",
                 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh")
        if shutil.which("unshare") is None or run("--version", before=small).returncode != 0:
            self.skipTest("a small /dev/shm needs the right to mount one")
        self.check_passes(run("verify", "--ranks", "2", "--tokens", "600", "--hidden", "4096",
                              before=small))


class Bench(Commands):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.json = Path(self.folder.name) / "bench.json"

    def file(self, name, content):
        path = Path(self.folder.name) / name
        path.write_bytes(content)
        return str(path)

    def measure(self, *flags):
        done = run(*bench(*flags, "--json", self.json), "--check")
        self.check_passes(done)
        return json.loads(self.json.read_text()), done

    def test_a_sweep_is_measured_and_checked(self):
        found, done = self.measure("--ranks", "4", "--tokens", "1,16", "--dtype",
                                   "bf16,fp8", "--topk", "3")
        self.assertEqual((found["checked"], found["wrong_elements"]), (True, 0))
        self.assertEqual((found["args"]["ranks"], found["args"]["iters"]), (4, 3))
        shapes = {(row["tokens"], row["dtype"], row["operation"]) for row in found["results"]}
        operations = {"layout", "dispatch", "dispatch_cached", "combine", "pair_cached",
                      "layout_pair"}
        self.assertEqual(shapes, {(tokens, dtype, operation) for tokens in (1, 16)
                                  for dtype in ("bf16", "fp8") for operation in operations})
        for row in found["results"]:
            self.assertGreater(row["min_us"], 0)
            self.assertLessEqual(row["min_us"], row["median_us"])
            self.assertLessEqual(row["median_us"], row["p99_us"])
            self.assertGreaterEqual(row["logical_gbps"], row["wire_gbps"])
            self.assertGreater(row["checked_elements"], 0, row["operation"])
        self.assertEqual(len(re.findall(r"^\[\d/4\] tokens", done.stderr, re.M)), 4)
        self.assertIn("median us", done.stdout)

    def test_bytes_are_those_of_the_routing(self):
        for routing, logical, wire in (("to-self", 16, 0), ("all-to-all", 32, 16)):
            found, _ = self.measure("--tokens", "16", "--topk", "2", "--routing",
                                    routing)
            row = next(row for row in found["results"] if row["operation"] == "combine")
            self.assertEqual((row["logical_bytes_per_rank"], row["wire_bytes_per_rank"]),
                             (logical * 64 * 2, wire * 64 * 2))

    def test_every_routing_is_measured(self):
        header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3), }"
        header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
        npy = self.file("ids.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header +
                        struct.pack("<6q", 0, 23, -1, 5, 5, 7))
        text = self.file("ids.txt", b"# recorded\n0 23 -1\n5, 6, 7\n")
        for flags in (("uniform",), ("zipf",), ("grouped",), ("file", "--routing-file", npy),
                      ("file", "--routing-file", text)):
            found, _ = self.measure("--ranks", "3", "--routing", *flags)
            self.assertEqual((found["wrong_elements"], found["args"]["routing"]), (0, flags[0]))
            topk = 3 if flags[0] == "file" else 8
            self.assertEqual({row["topk"] for row in found["results"]}, {topk})

    def test_what_cannot_be_measured_is_refused_by_name(self):
        wide = self.file("wide.txt", b"0 24 1\n")
        for flags, words in ((("--routing", "file"), "--routing-file"),
                             (("--routing-file", wide), "--routing file"),
                             (("--routing", "file", "--routing-file", wide), "expert id 24"),
                             (("--iters", "0"), "--iters 0"), (("--hidden", "3"), "hidden = 3"),
                             (("--json", "/nowhere/bench.json"), "/nowhere/bench.json"),
                             (("--num-sms", "0"), "num_sms is 0"), (("--dtype", "x"), "'x'")):
            self.check_refused(*bench(*flags), words=words)

    def test_wrong_elements_fail_the_command(self):
        """Writes into the last row that a rank has received, as a fault of the library would."""
        tokens, hidden = 1024, 4096
        command = start(bench("--tokens", tokens, "--hidden", hidden, "--routing", "all-to-all",
                              "--iters", 20, "--json", self.json), variables())
        rank = children_of(command, 2)[1]
        while command.poll() is None:
            try:
                segments = segments_of(rank)
                if len(segments) < 2:
                    continue
                with open(segments[-1], "r+b", 0) as results:
                    while command.poll() is None:
                        results.seek((2 * tokens * hidden - 8) * 2)
                        results.write(b"\x13" * 16)
            except OSError:  # the rank has ended, or just mapped more
                pass
        out, err = command.communicate(timeout=60)
        self.assertEqual(command.returncode, 1, out + err)
        self.assertRegex(out, r"FAILED: [1-9]\d* wrong elements")
        self.assertGreater(json.loads(self.json.read_text())["wrong_elements"], 0)

    def hit(self, number, timeout_ms):
        """A running bench of whose ranks the third gets a signal; what the command wrote, and for
        how long it went on."""
        before = left_in_shm()
        command = start(bench("--ranks", "4", "--tokens", "64", "--iters", "100000000"),
                        variables(DEEP_EP_TIMEOUT_MS=str(timeout_ms)))
        ranks = children_of(command, 4)
        while command.poll() is None and len(segments_of(ranks[2])) < 2:  # until it has results
            time.sleep(0.01)
        os.kill(ranks[2], number)
        begin = time.monotonic()
        _, err = command.communicate(timeout=60)
        self.assertEqual(command.returncode, 1, err)
        self.assertEqual(left_in_shm(), before)
        for pid in ranks:
            self.assertFalse(Path(f"/proc/{pid}").exists(), "a rank is left")
        return err, time.monotonic() - begin

    def test_a_killed_rank_ends_the_others_at_once(self):
        err, lasted = self.hit(signal.SIGKILL, 30000)
        self.assertIn("rank 2 was killed by signal 9", err)
        self.assertRegex(err, r"(dispatch|combine|barrier|bootstrap).*rank 2 (has )?died")
        self.assertLess(lasted, 5)

    def test_a_stopped_rank_ends_the_others_in_the_configured_time(self):
        err, lasted = self.hit(signal.SIGSTOP, 1000)
        self.assertRegex(err, r"rank 2 did not (arrive|come).* within 1000 ms")
        self.assertIn("the ranks that go on are killed", err)
        self.assertLess(lasted, 8)


if __name__ == "__main__":
    main()
