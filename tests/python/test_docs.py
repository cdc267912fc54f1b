"""The tutorial's programs run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from ranks import _free_port

TUTORIAL = Path(__file__).parents[2] / "docs/python.md"


def test_the_tutorials_first_program_runs(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.S)
    program = next(text for text in programs if "__main__" in text)
    assert "29500" in program
    file = tmp_path / "first.py"
    file.write_text(program.replace("29500", str(_free_port())))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    differences = [float(text) for text in re.findall(r"difference ([0-9.]+)", done.stdout)]
    assert len(differences) == 4 and max(differences) < 0.1
