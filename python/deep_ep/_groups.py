"""How the ranks of a Buffer find each other: whatever the caller has as a group."""

import sys

from . import _C


class Group:
    """Ranks without torch and MPI, e.g. for NumPy programs. Made by one of the class methods.

    All methods are collective and block; one thread at a time.
    """

    def __init__(self, bootstrap):
        self._bootstrap = bootstrap

    @classmethod
    def from_environment(cls):
        """Ranks started by torchrun, mpirun, srun, or by hand with RANK and WORLD_SIZE; rank 0
        listens on MASTER_ADDR:MASTER_PORT."""
        return cls(_C.bootstrap_from_environment())

    @classmethod
    def tcp(cls, rank, size, address="127.0.0.1", port=29477, timeout=100.0):
        """`size` ranks of which rank 0 listens on address:port. `timeout` is in seconds."""
        return cls(_C.bootstrap_tcp(rank, size, address, port, round(timeout * 1000)))

    def rank(self):
        return self._bootstrap.rank()

    def size(self):
        return self._bootstrap.size()

    def all_gather_bytes(self, mine):
        """Every rank's bytes, in rank order."""
        return self._bootstrap.all_gather(mine)


def _number(group, *names):
    for name in names:
        value = getattr(group, name, None)
        if value is not None:
            return value() if callable(value) else value
    return None


def _distributed_of(group):
    """torch.distributed of a ProcessGroup of torch, also of a subclass made elsewhere; Paddle's
    groups work alike. None if there is none."""
    for kind in type(group).__mro__:
        framework = sys.modules.get(kind.__module__.split(".")[0])
        distributed = getattr(framework, "distributed", None)
        if hasattr(distributed, "all_gather_object"):
            return distributed
    return None


def _gather_of(group, size):
    """A function that gives every rank's bytes, in rank order."""
    if hasattr(group, "Get_rank"):  # mpi4py
        return group.allgather
    if callable(getattr(group, "all_gather_object", None)):
        def gather(mine):
            everyone = [None] * size
            group.all_gather_object(everyone, mine)
            return everyone
        return gather
    distributed = _distributed_of(group)
    if distributed is None:
        raise TypeError(
            f"group is {type(group).__module__}.{type(group).__qualname__}, must be a process "
            "group of torch.distributed, an mpi4py communicator, a deep_ep.Group, or have rank(), "
            "size() and all_gather_object(list, object)")

    def gather(mine):
        everyone = [None] * size
        distributed.all_gather_object(everyone, mine, group=group)
        return everyone[-size:]  # Paddle appends
    return gather


def rank_and_size(group):
    rank = _number(group, "Get_rank", "rank")
    size = _number(group, "Get_size", "size", "world_size")
    if not isinstance(rank, int) or not isinstance(size, int):
        raise TypeError(f"group is {type(group).__module__}.{type(group).__qualname__}, which has "
                        "no rank and size")
    return rank, size


def bootstrap_of(group):
    """The native module's way to gather bytes from all ranks of `group`."""
    if isinstance(group, Group):
        return group._bootstrap
    rank, size = rank_and_size(group)
    if size == 1:
        return _C.bootstrap_callback(0, 1, lambda mine: [mine])
    return _C.bootstrap_callback(rank, size, _gather_of(group, size))


