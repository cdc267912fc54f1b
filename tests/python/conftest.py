import os

import pytest
import torch

from ranks import Ranks, why_no_network


def _why_no_gpu():
    """Without a call to CUDA, which would be lost on processes that are forked later."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None if os.path.exists("/dev/nvidiactl") else "no GPU on this machine"


def _ranks_on(device):
    if device == "cuda" and (why := _why_no_gpu()):
        pytest.skip(why)
    everyone = Ranks(device)
    yield everyone
    everyone.stop()


@pytest.fixture(scope="session")
def cpu_ranks():
    yield from _ranks_on("cpu")


@pytest.fixture
def node_ranks(cpu_ranks):
    """Of the host, for tests whose ranks pose as several nodes."""
    if why := cpu_ranks.run(1, why_no_network)[0]:
        pytest.skip(why)
    return cpu_ranks


@pytest.fixture(scope="session")
def gpu_ranks():
    yield from _ranks_on("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(request):
    """Of the host, then of the GPUs."""
    return request.getfixturevalue("cpu_ranks" if request.param == "cpu" else "gpu_ranks")


def pytest_terminal_summary(terminalreporter):
    counts = {name: len(terminalreporter.stats.get(name, ()))
              for name in ("passed", "failed", "error", "skipped")}
    terminalreporter.write_line(f"{counts['passed']} passed, "
                                f"{counts['failed'] + counts['error']} failed, "
                                f"{counts['skipped']} skipped")
