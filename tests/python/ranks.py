"""Ranks for tests: processes that stay, have a gloo group for each number of ranks, and run what
they are sent."""

import ctypes
import multiprocessing
import os
import secrets
import traceback
from pathlib import Path

MOST_RANKS = 4
_TIMEOUT = 120


class RankError(AssertionError):
    """What went wrong on ranks, with their tracebacks."""


def _free_port():
    # Below those that the kernel gives to connections, which others may open meanwhile.
    return 20000 + secrets.randbelow(12000)


def _serve(rank, port, pipe, device):
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a Buffer then takes for a machine without
    import torch
    import torch.distributed as dist

    import routing
    routing.DEVICE = device
    torch.set_num_threads(1)
    if device == "cuda":  # ranks share GPUs when there are fewer
        torch.cuda.set_device(rank % torch.cuda.device_count())
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                            world_size=MOST_RANKS)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST_RANKS + 1)}
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
    """None where ranks can pose as several nodes. Asked of a rank, which then has UCX loaded."""
    import deep_ep
    library = Path(deep_ep.__file__).with_name("libdeep_ep_ucx.so")
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"several nodes need UCX: {error}"
    return None


class Ranks:
    """`run(size, function, *arguments)` calls function(group, *arguments) on `size` ranks and
    returns their answers. One that fails or hangs fails the test; then the processes are new."""

    def __init__(self, device="cpu"):
        self.device = device
        self._processes = []
        self._pipes = []

    def _start(self):
        # CUDA does not survive a fork; without it that saves the time to import torch.
        context = multiprocessing.get_context("fork" if self.device == "cpu" else "spawn")
        port = _free_port()
        for rank in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs, self.device),
                                      daemon=True)
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
            if not pipe.poll(_TIMEOUT if not wrong else 5):
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
