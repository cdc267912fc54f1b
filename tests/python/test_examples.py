"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_overlapped_halves_give_the_same(device, request):
    if device == "cuda":
        request.getfixturevalue("gpu_ranks")
    done = subprocess.run(
        [sys.executable, ROOT / "examples/python/overlap.py", "--ranks", "2", "--device", device],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "MASTER_PORT": str(free_port())})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
