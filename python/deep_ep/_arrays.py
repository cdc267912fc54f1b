"""Arrays of torch, NumPy and whoever speaks DLPack, as the native module sees them.

A view is (address, dtype, shape, strides in elements, CUDA device or -1). Neither torch nor NumPy
is imported before somebody has passed an array of it.
"""

import sys
from pathlib import Path

from . import _C

# Numbers of deep_ep::DType (include/deep_ep/types.hpp).
UINT8, BOOL, INT32, INT64, FLOAT32, FLOAT16, BFLOAT16, FLOAT8_E4M3 = range(8)
_DLPACK_CPU = 1
_NAMES = {"bool": BOOL, "int32": INT32, "int64": INT64, "float32": FLOAT32, "float16": FLOAT16,
          "bfloat16": BFLOAT16, "float8_e4m3fn": FLOAT8_E4M3}


class _TorchCodes(dict):
    """torch.dtype -> number; other types of one byte are opaque bytes to the library."""

    def __missing__(self, dtype):
        name = str(dtype).removeprefix("torch.")
        code = _NAMES.get(name, UINT8 if dtype.itemsize == 1 else None)
        if code is None:
            raise TypeError(f"tensors of {dtype} are not supported; allowed are "
                            f"{', '.join(_NAMES)} and any type of one byte")
        self[dtype] = code
        return code


_TORCH_CODES = _TorchCodes()


def compiled_calls(torch):
    """Where torch has calls for compiled code, or None."""
    return getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class TorchLibrary:
    """Views of torch tensors, and tensors of results: what the native module, which is given
    `native`, does not do by itself. It takes a view in one call where torch has one for all of a
    tensor (2.10), and makes tensors where it finds what that needs (`has_calls`)."""

    def __init__(self, torch):
        self.torch = torch
        self.is_tensor = torch.Tensor
        # By number of deep_ep::DType.
        self._dtypes = (torch.uint8, torch.bool, torch.int32, torch.int64, torch.float32,
                        torch.float16, torch.bfloat16, torch.float8_e4m3fn)
        # What torch's own compiled code calls; a quarter of the time of what it stands for.
        self._reinterpret = getattr(compiled_calls(torch), "_reinterpret_tensor", None)
        # What from_dlpack calls once it has found out that it was given a capsule.
        self._from_dlpack = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)
        self.has_calls = _C.load_torch(
            str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
        self.native = _C.Library(torch.Tensor, self.view, self.make, self.typed)

    def view(self, tensor, name, is_output=False):
        try:
            return (tensor.data_ptr(), _TORCH_CODES[tensor.dtype], tensor.shape, tensor.stride(),
                    tensor.get_device())
        except AttributeError:
            if not _is_foreign(tensor):
                raise _not_an_array(name, tensor, "torch.Tensor") from None
        return self.view(_exchanged(self.torch.from_dlpack, tensor, name), name, is_output)

    def make(self, result, code):
        """The tensor of a result: a view of the memory that torch gave, or of the library's."""
        dtype = self._dtypes[code]
        if type(result) is tuple:
            block, offset, shape, strides = result
            base = block if block.dtype == dtype else block.view(dtype)
            return self._own(base, shape, strides, offset // dtype.itemsize)
        tensor = self._from_dlpack(result.capsule())
        return tensor if tensor.dtype == dtype else tensor.view(dtype)

    def typed(self, tensor, dtype):
        """A result as what its bytes are, which the native module knows of few types."""
        if tensor.dtype == dtype:
            return tensor
        view = tensor.view(dtype)
        return self._own(view, tuple(view.shape), view.stride(), 0)

    def _own(self, base, shape, strides, offset):
        """A tensor over the memory of `base`, from element `offset` of that on; no view, since what
        autograd returns must not be one of a tensor that it does not know."""
        if self._reinterpret is not None:
            return self._reinterpret(base, shape, strides, offset)
        tensor = self.torch.empty(0, dtype=base.dtype, device=base.device)
        return tensor.set_(base.untyped_storage(), base.storage_offset() + offset, shape, strides)

    def code(self, dtype):
        return _TORCH_CODES[dtype]


class NumpyLibrary:
    """The same for NumPy, with ml_dtypes for the types that NumPy lacks."""

    def __init__(self, numpy):
        self.numpy = numpy
        self.is_tensor = numpy.ndarray
        self.native = _C.Library(numpy.ndarray, self.view, self.make, self.typed)

    def view(self, array, name, is_output=False):
        if not isinstance(array, self.numpy.ndarray):
            if not _is_foreign(array):
                raise _not_an_array(name, array, "numpy.ndarray")
            # What NumPy makes of these may be read-only because it was not told.
            array, is_output = _exchanged(self.numpy.from_dlpack, array, name), False
        if is_output and not array.flags.writeable:
            raise ValueError(f"{name} is read-only, must be writeable: the call writes to it")
        if not array.dtype.isnative:
            raise TypeError(f"{name} is of {array.dtype.str}, must be in the byte order of this "
                            "machine")
        code, size = self.code(array.dtype), array.itemsize
        if any(stride % size and length > 1
               for stride, length in zip(array.strides, array.shape)):
            raise ValueError(f"{name} has strides of {array.strides} bytes, must be multiples of "
                             f"its items' {size}")
        return (array.__array_interface__["data"][0], code, array.shape,
                tuple(stride // size for stride in array.strides), -1)

    def make(self, result, code):
        array = self.numpy.asarray(result)
        return self.typed(array, _ml_dtype(code)) if code in _ML_NAMES else array

    def typed(self, array, dtype):
        return array if array.dtype == dtype else array.view(dtype)

    def code(self, dtype):
        dtype = self.numpy.dtype(dtype)
        code = _NAMES.get(dtype.name, UINT8 if dtype.itemsize == 1 else None)
        if code is None:
            raise TypeError(f"arrays of {dtype} are not supported; allowed are "
                            f"{', '.join(_NAMES)} (of ml_dtypes where NumPy has none) and any type "
                            "of one byte")
        return code


# Of ml_dtypes, since NumPy has none.
_ML_NAMES = {BFLOAT16: "bfloat16", FLOAT8_E4M3: "float8_e4m3fn"}


def _ml_dtype(code):
    import ml_dtypes
    return getattr(ml_dtypes, _ML_NAMES[code])


def _not_an_array(name, value, expected):
    return TypeError(f"{name} is {type(value).__module__}.{type(value).__qualname__}, must be "
                     f"{expected} like the other arrays of the call")


def _is_foreign(array):
    """Neither torch's nor NumPy's, and speaks DLPack."""
    return (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
            and _known_library(array) is None)


def _exchanged(from_dlpack, array, name):
    """What `from_dlpack` makes of a foreign array: a view of its memory, which `array` keeps."""
    try:
        return from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = type(array)
        raise TypeError(f"{name} is {kind.__module__}.{kind.__qualname__}, which "
                        f"{from_dlpack.__module__}.from_dlpack does not take: {error}") from error


_libraries = {}


def library_of_name(name):
    """The library `name`, imported; ImportError if it is not installed."""
    library = _libraries.get(name)
    if library is None:
        if name == "torch":
            import torch
            import torch.utils.dlpack
            library = TorchLibrary(torch)
        else:
            import numpy
            library = NumpyLibrary(numpy)
        _libraries[name] = library
    return library


def _known_library(array):
    """torch's or NumPy's, if `array` is an array of theirs, else None."""
    for known in ("torch", "numpy"):
        if sys.modules.get(known) is not None:
            library = library_of_name(known)
            if isinstance(array, library.is_tensor):
                return library
    return None


def library_of(array, name):
    """Whose arrays a call takes and returns, told by its first argument. For arrays of others that
    speak DLPack it is torch, if that is imported or they are not of the host, else NumPy."""
    torch = _libraries.get("torch")
    if torch is not None and isinstance(array, torch.is_tensor):
        return torch
    library = _known_library(array)
    if library is not None:
        return library
    if _is_foreign(array):
        of_host = int(array.__dlpack_device__()[0]) == _DLPACK_CPU
        return library_of_name("numpy" if of_host and not sys.modules.get("torch") else "torch")
    raise TypeError(f"{name} is {type(array).__module__}.{type(array).__qualname__}, must be a "
                    "torch.Tensor, a numpy.ndarray or an array with __dlpack__")


def library_of_dtype(dtype):
    """The library whose type of elements `dtype` is."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return library_of_name("torch")
    return library_of_name("numpy")
