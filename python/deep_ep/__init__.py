"""Dispatch and combine for mixture-of-experts layers; the interface is DeepEP's.

Importing needs no GPU, no torch and no NumPy. What is missing for a Buffer is said when one is
made.
"""

try:
    from . import _C
except ImportError as error:
    raise ImportError(f"deep_ep: the native module does not load ({error}); install the package "
                      "again with `pip install .` in its source folder") from error

from ._C import Error, __version__
from ._groups import Group
from ._rows import GroupedDispatch, PreparedDispatch, RowGroups
from .buffer import Buffer
from .config import Config
from .event import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "Error", "EventHandle", "EventOverlap", "Group", "GroupedDispatch",
           "PreparedDispatch", "RowGroups", "__version__", "topk_idx_t"]


def __getattr__(name):
    if name == "topk_idx_t":  # lazy: neither library is imported before somebody asks
        try:
            import torch
            return torch.int64
        except ImportError:
            import numpy
            return numpy.int64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
