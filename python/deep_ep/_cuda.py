"""What a Buffer on a GPU needs of torch: streams, and memory that torch knows of."""

import sys

from . import _C


def comm_stream_of(native, device):
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if device < 0:
        return torch.cpu.current_stream()
    return torch.cuda.ExternalStream(native, device=device)


class CudaMemory:
    """The memory of one Buffer's results, allocated by torch, so that record_stream, graphs and
    garbage collection treat them as any tensor. What peers write comes from a pool over the
    Buffer's segments, all else from torch's own.

    A block's earlier work is on the stream that it was allocated for, and the communication stream
    waits for the current one, or for the previous event, before it writes. So blocks are the
    current stream's, except behind a previous event, where they are the communication stream's.
    """

    def __init__(self, device):
        self.device = device
        self._check()
        import torch
        self.torch = torch
        memory = torch.cuda.memory
        plugin = memory.CUDAPluggableAllocator(_C.__file__, "deep_ep_torch_alloc",
                                               "deep_ep_torch_free")
        self._plugin = plugin  # torch's pool does not keep it
        self._pool = torch.cuda.MemPool(plugin.allocator())
        self._place = torch.device("cuda", device)
        self.comm_stream = None

    @staticmethod
    def _check():
        if _C.num_cuda_devices() == 0:
            raise RuntimeError("deep_ep: " + "; ".join(_C.describe_cuda_devices()) + "; pass "
                               "device='cpu' for a Buffer of the host")
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch.cuda, "MemPool"):
            raise RuntimeError("deep_ep: GPUs need torch 2.6 or newer, imported first (it has "
                               "torch.cuda.MemPool)")

    def set_comm_stream(self, native):
        self.comm_stream = self.torch.cuda.ExternalStream(native, device=self.device)

    def current_stream(self):
        return self.torch._C._cuda_getCurrentRawStream(self.device)

    def close(self):
        """No more calls. Pieces of the pool under live tensors stay with them."""
        self._pool = None

    def allocate(self, num_bytes, mapped, behind_event, async_finish):
        """The native module's question for memory: (address, tensor of bytes)."""
        torch = self.torch
        if behind_event:
            caller = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self.comm_stream):
                block = self._empty(num_bytes, mapped)
            if block is not None and not torch.cuda.is_current_stream_capturing():
                block.record_stream(caller)
        else:
            block = self._empty(num_bytes, mapped)
            if block is not None and async_finish and not torch.cuda.is_current_stream_capturing():
                block.record_stream(self.comm_stream)
        return None if block is None else (block.data_ptr(), block)

    def _empty(self, num_bytes, mapped):
        torch = self.torch
        if not mapped:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._place)
        with torch.cuda.use_mem_pool(self._pool, self._place):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._place)


def record_stream(memory, used):
    """The communication stream uses the tensors `used` of an asynchronous call: tells torch, or,
    where a capture forbids that, returns them for somebody to hold."""
    torch = memory.torch
    tensors = [one for one in _flat(used) if isinstance(one, torch.Tensor)]
    if torch.cuda.is_current_stream_capturing():
        return tensors
    for tensor in tensors:
        tensor.record_stream(memory.comm_stream)
    return None


def _flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
