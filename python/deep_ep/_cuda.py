"""What a Buffer on a GPU needs of torch: streams, and memory that torch knows of."""

import sys
from functools import cache, partial

from . import _C
from ._arrays import compiled_calls, library_of_name


def comm_stream_of(native, device):
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if device < 0:
        return torch.cpu.current_stream()
    return torch.cuda.ExternalStream(native, device=device)


@cache
def _plugin():
    """What torch asks for the memory of our pools. Of the process: torch gives memory back through
    it when it likes."""
    from torch.cuda.memory import CUDAPluggableAllocator
    return CUDAPluggableAllocator(_C.__file__, "deep_ep_torch_alloc", "deep_ep_torch_free")


def require_gpu():
    """RuntimeError that says what is missing for a Buffer on a GPU."""
    if _C.num_cuda_devices() == 0:
        raise RuntimeError("deep_ep: " + "; ".join(_C.describe_cuda_devices()) + "; pass "
                           "device='cpu' for a Buffer of the host")
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch.cuda, "MemPool"):
        raise RuntimeError("deep_ep: GPUs need torch 2.6 or newer, imported before a Buffer is "
                           "made; pass device='cpu' for a Buffer of the host")
    return torch


class CudaMemory:
    """The memory of one Buffer's results, allocated by torch, so that record_stream, graphs and
    garbage collection treat them as any tensor. What peers write comes from a pool over the
    Buffer's segments, all else from torch's own.

    A block's earlier work is on the stream that it was allocated for, and the communication stream
    waits for the current one, or for the previous event, before it writes. So blocks are the
    current stream's, except behind a previous event, where they are the communication stream's.
    """

    def __init__(self, device):
        self.torch = require_gpu()
        self.device = device
        self._place = self.torch.device("cuda", device)
        with self.torch.cuda.device(device):
            self._pool = self.torch.cuda.MemPool(_plugin().allocator())
        # What use_mem_pool does, which as a context manager takes longer than the allocation.
        native = self.torch._C
        self._begin = getattr(native, "_cuda_beginAllocateCurrentThreadToPool", None)
        self._ends = (native._cuda_endAllocateToPool, native._cuda_releasePool)
        self._pool_id = self._pool.id
        self._empty_strided = getattr(compiled_calls(self.torch), "_empty_strided_cuda", None)
        self._current_device = native._cuda_getDevice
        self.current_stream = partial(native._cuda_getCurrentRawStream, device)
        self.comm_stream = None
        library_of_name("torch")  # so that the native module knows it
        self._pool_calls = None
        if self._begin is not None:
            self._pool_calls = (native._cuda_isCurrentStreamCapturing, self._begin, *self._ends,
                                (device, self._pool_id))

    def allocator(self):
        """For the native module, which holds it. Not kept here: it holds this object, and no
        garbage collection would find that cycle, nor free the pool of a dropped Buffer."""
        return _C.Allocator(self.allocate, self.device, self._pool_calls, self.current_stream)

    def set_comm_stream(self, native):
        self.comm_stream = self.torch.cuda.ExternalStream(native, device=self.device)

    def is_capturing(self):
        return self.torch.cuda.is_current_stream_capturing()

    def close(self):
        """No more calls. Pieces of the pool under live tensors stay with them."""
        self._pool = None

    def allocate(self, num_bytes, mapped, behind_event, async_finish):
        """The native module's question for memory: (address, tensor of bytes). Of plain calls it
        takes memory by itself, as _empty does, where torch lets it."""
        torch = self.torch
        if behind_event:
            with torch.cuda.stream(self.comm_stream):
                block = self._empty(num_bytes, mapped)
            block.record_stream(torch.cuda.current_stream(self.device))
        else:
            block = self._empty(num_bytes, mapped)
            if async_finish and not self.is_capturing():
                block.record_stream(self.comm_stream)
        return block.data_ptr(), block

    def _empty(self, num_bytes, mapped):
        torch = self.torch
        num_bytes = (num_bytes + 15) // 16 * 16  # of whole elements, whatever they are
        if not mapped:
            return self._bytes(num_bytes)
        if self._begin is None or self.is_capturing():  # in which case the graph keeps the pool
            with torch.cuda.use_mem_pool(self._pool, self._place):
                return self._bytes(num_bytes)
        self._begin(self.device, self._pool_id)
        try:
            return self._bytes(num_bytes)
        finally:
            for end in self._ends:
                end(self.device, self._pool_id)

    def _bytes(self, count):
        if self._empty_strided is not None and self._current_device() == self.device:
            return self._empty_strided((count,), (1,), self.torch.uint8)
        return self.torch.empty(count, dtype=self.torch.uint8, device=self._place)

    def hold(self, used, results):
        """The communication stream uses the tensors of an asynchronous call: tells torch, which
        knows of the results already, or, where a capture forbids that, returns them for somebody
        to hold."""
        if self.is_capturing():
            return [*self._tensors_of(used), *self._tensors_of(results)]
        for tensor in self._tensors_of(used):
            tensor.record_stream(self.comm_stream)
        return None

    def _tensors_of(self, values):
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._tensors_of(value)
            elif isinstance(value, self.torch.Tensor):
                yield value
