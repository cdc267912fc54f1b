"""The tutorial's program and the examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import free_port

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/python.md"


def test_the_tutorials_first_program_runs(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.S)
    program = next(text for text in programs if "__main__" in text)
    assert "29500" in program
    file = tmp_path / "first.py"
    file.write_text(program.replace("29500", str(free_port())))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    differences = [float(text) for text in re.findall(r"difference ([0-9.]+)", done.stdout)]
    assert len(differences) == 4 and max(differences) < 0.1


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
