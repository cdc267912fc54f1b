"""Points in a stream of work, and what is said to wait for them."""

import sys
from functools import cache, partial

from . import _C


@cache
def _serves_gpus():
    return _C.num_cuda_devices() > 0


def current_stream(device=None):
    """(stream, device) of the caller's work as numbers: of torch's current CUDA stream, (0, -1)
    where nothing was ever done on a GPU that we serve."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or not _serves_gpus():
        return 0, -1
    if device is None:
        device = torch.cuda.current_device()
    return torch._C._cuda_getCurrentRawStream(device), device


class EventHandle:
    """A point in a stream of work: the end of what the caller's current stream has when the handle
    is made, or the end of a call that returned it. On the host the caller's stream is the calling
    thread, whose work is done."""

    def __init__(self):
        self._event = _C.EventHandle(*current_stream())

    @classmethod
    def _of(cls, event):
        handle = cls.__new__(cls)
        handle._event = event
        return handle

    def current_stream_wait(self):
        """Work queued on the current stream from now on waits for the event; on the host the
        calling thread does. Raises `deep_ep.Error` if the call that it stands for failed."""
        self._event.stream_wait(*current_stream())

    def query(self):
        """True once it has happened. Never blocks."""
        return self._event.query()

    def synchronize(self):
        """Blocks the calling thread until it has happened."""
        self._event.host_wait()


class EventOverlap:
    """An event of a call, to be waited for when its results are needed. `event` is None for calls
    that were not asynchronous. `extra_tensors` are kept alive as long as this object."""

    event = extra_tensors = None  # of `no_event`

    def __init__(self, event=None, extra_tensors=None):
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self):
        """Makes the current stream wait for the event."""
        if self.event is None:
            raise RuntimeError("current_stream_wait: there is no event; only calls with "
                               "async_finish=True return one")
        self.event.current_stream_wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.event is not None:
            self.event.current_stream_wait()


# What a call that was not asynchronous returns: an EventOverlap() in a quarter of the time.
no_event = partial(object.__new__, EventOverlap)
