"""The command line tool under torchrun itself: an agent for each of two nodes, both on this
machine, which starts two ranks."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

DEEPEP = Path(__file__).resolve().parents[2] / "build/host/bin/deepep"
SHAPE = ["--tokens", "16", "--hidden", "64", "--experts", "24"]


def torchrun(*command):
    """(status, out and err) of both agents."""
    endpoint = f"127.0.0.1:{20000 + secrets.randbelow(12000)}"
    environment = {**os.environ, "DEEP_EP_RANKS_PER_NODE": "2", "DEEP_EP_TIMEOUT_MS": "60000"}
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
         "--node-rank", str(node), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
         "--local-addr", "127.0.0.1", "--no-python", str(DEEPEP), *command],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in range(2)]
    texts = [agent.communicate(timeout=180)[0] for agent in agents]
    return [(agent.returncode, text) for agent, text in zip(agents, texts)]


@pytest.fixture
def network(cpu_node_ranks):
    """Skips where nodes of this machine have no transport."""
    if not DEEPEP.exists():
        pytest.skip(f"{DEEPEP} was not built (./dev build)")


def test_bench_takes_its_ranks_from_torchrun(network, tmp_path):
    file = tmp_path / "bench.json"
    answers = torchrun("bench", "internode", *SHAPE, "--iters", "2", "--warmup", "1",
                       "--json", str(file))
    if any(status != 0 for status, _ in answers):
        pytest.fail("\n".join(text for _, text in answers))  # whole, unlike an assertion's
    assert sum(text.count("2 nodes of 2 ranks") for _, text in answers) == 1, answers
    found = json.loads(file.read_text())
    assert (found["args"]["ranks"], found["args"]["nodes"]) == (4, 2)
    assert (found["checked"], found["wrong_elements"]) == (True, 0)


def test_what_a_rank_finds_wrong_ends_torchrun(network):
    """--nodes contradicts the launcher: all ranks say so, and both agents fail."""
    answers = torchrun("verify", "internode", "--tokens", "4", "--nodes", "3",
                       "--ranks-per-node", "2")
    for status, text in answers:
        assert status != 0
        assert "3 nodes of 2 ranks contradict the launcher, which started 4" in text
