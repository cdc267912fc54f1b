import os

import pytest
import torch

from ranks import GpuNodeRanks, Ranks, why_no_network


def _why_no_gpu():
    """Without a call to CUDA, which would be lost on processes that are forked later."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None if os.path.exists("/dev/nvidiactl") else "no GPU on this machine"


def _until_the_end(everyone):
    yield everyone
    everyone.stop()


@pytest.fixture(scope="session")
def cpu_ranks():
    yield from _until_the_end(Ranks("cpu"))


@pytest.fixture(scope="session")
def gpu_ranks():
    if why := _why_no_gpu():
        pytest.skip(why)
    yield from _until_the_end(Ranks("cuda"))


@pytest.fixture
def cpu_node_ranks(cpu_ranks):
    """Of the host, for tests whose ranks pose as several nodes."""
    if why := cpu_ranks.run(1, why_no_network)[0]:
        pytest.skip(why)
    return cpu_ranks


@pytest.fixture(scope="session")
def gpu_node_ranks():
    """Of the GPUs, for the same."""
    if why := _why_no_gpu():
        pytest.skip(why)
    everyone = GpuNodeRanks()
    if why := everyone.of(2).run(1, why_no_network)[0]:
        everyone.stop()
        pytest.skip(why)
    yield from _until_the_end(everyone)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(request):
    """Of the host, then of the GPUs."""
    return request.getfixturevalue("cpu_ranks" if request.param == "cpu" else "gpu_ranks")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def node_ranks(request):
    """Of the host, then of the GPUs, for tests whose ranks pose as several nodes."""
    return request.getfixturevalue("cpu_node_ranks" if request.param == "cpu" else "gpu_node_ranks")


def pytest_terminal_summary(terminalreporter):
    counts = {name: len(terminalreporter.stats.get(name, ()))
              for name in ("passed", "failed", "error", "skipped")}
    terminalreporter.write_line(f"{counts['passed']} passed, "
                                f"{counts['failed'] + counts['error']} failed, "
                                f"{counts['skipped']} skipped")
