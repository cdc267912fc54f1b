"""Ranks for tests: processes that stay, have a gloo group for each number of ranks, and run what
they are sent."""

import ctypes
import importlib.util
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

MOST_RANKS = 4
TIMEOUT = 120


class RankError(AssertionError):
    """What went wrong on ranks, with their tracebacks."""


def free_port():
    # Below those that the kernel gives to connections, which others may open meanwhile.
    return 20000 + secrets.randbelow(12000)


def _serve(rank, most_ranks, port, pipe, device):
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a Buffer then takes for a machine without
    import torch
    import torch.distributed as dist

    import routing
    routing.DEVICE = device
    torch.set_num_threads(1)
    if device == "cuda":  # ranks share GPUs when there are fewer: as many on each, as NVSHMEM asks
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % max(n for n in range(1, gpus + 1) if most_ranks % n == 0))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                            world_size=most_ranks)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, most_ranks + 1)}
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, size, arguments = job
        try:
            pipe.send((True, function(groups[size], *arguments)))
        except BaseException:  # a rank that fails must say so, whatever it was
            pipe.send((False, traceback.format_exc()))


def why_no_network(_group):
    """None where ranks can pose as several nodes. Asked of a rank, which then has UCX, or with GPUs
    NVSHMEM, loaded."""
    import deep_ep
    import routing
    name, file = {"cpu": ("UCX", "libdeep_ep_ucx.so"),
                  "cuda": ("NVSHMEM", "libdeep_ep_nvshmem.so")}[routing.DEVICE]
    try:
        ctypes.CDLL(str(Path(deep_ep.__file__).with_name(file)))
    except OSError as error:
        return f"several nodes need {name}: {error}"
    return None


def nvshmem_environment():
    """What NVSHMEM needs for ranks of one machine: where it is, NVSHMEM_HOME or Python's package,
    and to leave alone networks and NVLink multicast."""
    home = os.environ.get("NVSHMEM_HOME")
    if home is None and importlib.util.find_spec("nvidia") is not None:
        package = importlib.util.find_spec("nvidia.nvshmem")
        home = package and package.submodule_search_locations[0]
    variables = {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_DISABLE_NCCL": "1",
                 "NVSHMEM_REMOTE_TRANSPORT": "none", **os.environ}
    if home is not None:
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(
            [f"{home}/lib", *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return variables


def num_gpus(_group):
    """That a rank sees; whoever starts processes by forking must not ask CUDA itself."""
    import torch
    return torch.cuda.device_count()


class Ranks:
    """`run(size, function, *arguments)` calls function(group, *arguments) on `size` ranks and
    returns their answers. One that fails or hangs fails the test; then the processes are new."""

    def __init__(self, device="cpu", most_ranks=MOST_RANKS):
        self.device = device
        self.most_ranks = most_ranks
        self._processes = []
        self._pipes = []

    def _start(self):
        # CUDA does not survive a fork; without it that saves the time to import torch.
        context = multiprocessing.get_context("fork" if self.device == "cpu" else "spawn")
        variables = nvshmem_environment() if self.device == "cuda" else {}
        port = free_port()
        for rank in range(self.most_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, daemon=True,
                                      args=(rank, self.most_ranks, port, theirs, self.device))
            with mock.patch.dict(os.environ, variables):
                process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def run(self, size, function, *arguments):
        if not self._processes:
            self._start()
        for pipe in self._pipes[:size]:
            pipe.send((function, size, arguments))
        answers, wrong = [], []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(TIMEOUT if not wrong else 5):
                wrong.append(f"rank {rank} does not answer")
                continue
            try:
                good, answer = pipe.recv()
            except EOFError:
                good, answer = False, "it died"
            if good:
                answers.append(answer)
            else:
                wrong.append(f"rank {rank}: {answer}")
        if wrong:
            self.stop()
            raise RankError("\n".join(wrong))
        return answers


class GpuNodeRanks:
    """The same for ranks on GPUs that pose as several nodes. A process joins NVSHMEM once, with all
    ranks of its first Buffer over nodes, so each number of ranks has processes of its own."""

    def __init__(self):
        self._pools = {}

    def of(self, size):
        """The Ranks of which `size` are all."""
        return self._pools.setdefault(size, Ranks("cuda", size))

    def run(self, size, function, *arguments):
        return self.of(size).run(size, function, *arguments)

    def stop(self):
        for pool in self._pools.values():
            pool.stop()


def run_program(program, ranks=2, **variables):
    """What each rank of `program`, whose arguments are rank and port, says on stdout and stderr."""
    port = str(free_port())
    running = [subprocess.Popen([sys.executable, program, str(rank), port], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, **variables})
               for rank in range(ranks)]
    try:
        answers = [process.communicate(timeout=TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * ranks, answers
    return answers


def run_without_library(program, file, ranks=2, **variables):
    """What `program`, whose arguments are rank and port, prints on ranks that pose as a node each
    and have a copy of the package without its library `file`. That lies in `lib`, beside them."""
    import deep_ep
    packages, elsewhere = program.parent / "packages", program.parent / "lib"
    if not packages.exists():
        shutil.copytree(Path(deep_ep.__file__).parent, packages / "deep_ep")
        elsewhere.mkdir()
        shutil.move(packages / "deep_ep" / file, elsewhere)
    paths = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    answers = run_program(program, ranks, **{"PYTHONPATH": paths, "DEEP_EP_RANKS_PER_NODE": "1",
                                             **variables})
    return [out.strip() for out, _ in answers]
