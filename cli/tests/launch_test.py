"""Commands over several nodes under launchers: launch_test.py DEEPEP. One process a rank, and ranks
of this machine that pose as nodes."""

import json
import secrets
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import command_runs
from command_runs import DEEPEP, main, start


def variables(**more):
    """Those of all commands, and more; a port of its own."""
    # Below those that the kernel gives to connections: other tests run meanwhile.
    port = 20000 + secrets.randbelow(12000)
    return command_runs.variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **more)


def run_ranks(arguments, each, **shared):
    """Starts a process for each element of `each`, its own variables; (status, out, err) of all."""
    environment = variables(**shared)
    running = [start(arguments, {**environment, **own}) for own in each]
    answers = [process.communicate(timeout=120) for process in running]
    return [(process.returncode, *answer) for process, answer in zip(running, answers)]


def torchrun(size):
    return [{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            for rank in range(size)]


NOBODY = [{"MASTER_ADDR": "", "MASTER_PORT": ""}]  # launches: one process, which forks ranks
SMALL_BENCH = ["bench", "internode", "--tokens", "16", "--hidden", "64", "--experts", "24",
               "--iters", "2", "--warmup", "1"]


class Launch(unittest.TestCase):
    def check_ranks(self, answers, words):
        """All ended well, and the first alone says so."""
        for status, _, err in answers:
            self.assertEqual(status, 0, err)
        self.assertIn(words, answers[0][1])
        self.assertEqual([out for _, out, _ in answers[1:]], [""] * (len(answers) - 1))

    def check_refused(self, answers, words):
        for status, out, err in answers:
            self.assertEqual((status, out), (1, ""))
            self.assertIn(words, err)

    def test_variables_of_torchrun_make_ranks(self):
        verify = ["verify", "internode", "--tokens", "20", "--grouped", "--prepare"]
        self.check_ranks(run_ranks(verify, torchrun(4), DEEP_EP_RANKS_PER_NODE="2",
                                   TORCHELASTIC_USE_AGENT_STORE="True"),
                         "1 passed, 0 failed on 4 ranks")
        self.check_ranks(run_ranks([*verify, "--nodes", "2", "--ranks-per-node", "1"], torchrun(2)),
                         "1 passed, 0 failed on 2 ranks")

    def test_verify_itself_takes_ranks_of_several_nodes(self):
        self.check_ranks(run_ranks(["verify", "--tokens", "20"], torchrun(2),
                                   DEEP_EP_RANKS_PER_NODE="1"), "1 passed, 0 failed on 2 ranks")

    def check_bench(self, run, nodes, ranks_per_node):
        """run(arguments) gives (status, out, err) of each process; one of them wrote the JSON."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "bench.json"
            self.check_ranks(run([*SMALL_BENCH, "--json", str(file)]),
                             f"{nodes} nodes of {ranks_per_node} ranks")
            found = json.loads(file.read_text())
        self.assertEqual((found["args"]["ranks"], found["args"]["nodes"]),
                         (nodes * ranks_per_node, nodes))
        self.assertEqual((found["checked"], found["wrong_elements"]), (True, 0))
        self.assertEqual({row["tokens"] for row in found["results"]}, {16})

    def test_bench_takes_its_ranks_from_variables_of_torchrun(self):
        self.check_bench(lambda arguments: run_ranks(arguments, torchrun(4),
                                                     DEEP_EP_RANKS_PER_NODE="2"), 2, 2)

    def test_variables_of_slurm_make_ranks(self):
        each = [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3", "SLURM_STEP_NUM_NODES": "3"}
                for rank in range(3)]
        self.check_bench(lambda arguments: run_ranks(arguments, each, DEEP_EP_RANKS_PER_NODE="1"),
                         3, 1)

    def test_without_a_launcher_ranks_of_this_machine_are_nodes(self):
        for nodes, ranks_per_node in ((2, 2), (3, 1)):
            shape = ["--nodes", str(nodes), "--ranks-per-node", str(ranks_per_node)]
            self.check_bench(lambda arguments: run_ranks([*arguments, *shape], NOBODY),
                             nodes, ranks_per_node)

    def test_nodes_may_have_eight_ranks_and_more(self):
        for ranks_per_node in (8, 12):
            for mode in ("internode", "low-latency"):
                verify = ["verify", mode, "--tokens", "16", "--hidden", "256", "--experts",
                          str(4 * ranks_per_node), "--nodes", "2", "--ranks-per-node",
                          str(ranks_per_node)]
                self.check_ranks(run_ranks(verify, NOBODY),
                                 f"1 passed, 0 failed on {2 * ranks_per_node} ranks")

    def test_mpirun_makes_ranks(self):
        mpirun = shutil.which("mpirun")
        if mpirun is None:
            self.skipTest("there is no mpirun (Debian: openmpi-bin)")
        environment = variables(DEEP_EP_RANKS_PER_NODE="2", OMPI_ALLOW_RUN_AS_ROOT="1",
                                OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        for command, words in ((["verify", "internode", "--tokens", "20"],
                                "1 passed, 0 failed on 4 ranks"),
                               (["bench", "internode", "--tokens", "16", "--hidden", "64",
                                 "--iters", "2", "--warmup", "1"], "2 nodes of 2 ranks")):
            done = subprocess.run([mpirun, "--oversubscribe", "--bind-to", "none", "-n", "4",
                                   DEEPEP, *command], env=environment, capture_output=True,
                                  text=True, timeout=120)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout.count(words), 1, done.stdout)

    def test_ranks_of_one_node_are_told_how_to_be_several(self):
        for command in ("verify", "bench"):
            self.check_refused(run_ranks([command, "internode", "--tokens", "4"], torchrun(2)),
                               "the 2 ranks are of one node")
        self.check_refused(run_ranks(["bench", "intranode", "--tokens", "4"], torchrun(2),
                                     DEEP_EP_RANKS_PER_NODE="1"), "use bench internode")

    def test_what_contradicts_the_launcher_is_named(self):
        verify = ["verify", "internode", "--tokens", "4"]
        for arguments, shared, words in (
                (["--nodes", "3"], {"DEEP_EP_RANKS_PER_NODE": "1"},
                 "3 nodes of 1 ranks contradict the launcher, which started 2"),
                (["--ranks-per-node", "2"], {"DEEP_EP_RANKS_PER_NODE": "1"},
                 "--ranks-per-node is 2, but DEEP_EP_RANKS_PER_NODE is 1"),
                (["--nodes", "1"], {}, "--nodes is 1, must be at least 2")):
            self.check_refused(run_ranks([*verify, *arguments], torchrun(2), **shared), words)

    def test_ranks_of_other_machines_need_an_address(self):
        for each, words in (
                ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4",
                  "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_SIZE is 2"),
                ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2"},
                 "SLURM_STEP_NUM_NODES is 2")):
            answers = run_ranks(["verify", "internode"], [{**each, "MASTER_ADDR": ""}])
            self.assertEqual(answers[0][0], 1)
            self.assertIn(words, answers[0][2])
            self.assertIn("MASTER_ADDR", answers[0][2])


if __name__ == "__main__":
    main()
