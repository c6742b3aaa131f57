"""The one door through which every compiled kernel is called."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.build import BuildError, built_library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_LEAST_WORK = 2**15  # elements for which a second thread pays
_LARGE = 2**22  # bytes of a result that gets large pages


class View(ctypes.Structure):
    """Streams [T, n, C] or vectors [T, C] of any strides: the struct of `views.h`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("stream", ctypes.c_int64),
        ("column", ctypes.c_int64),
    )
    tensor: Tensor


class Call(NamedTuple):
    """One call of a kernel.

    Attributes:
        name: The kernel's name.
        views: The operands and results of the size of the streams or of a sub-layer's output. Each
            is read from memory, or written, once.
    """

    name: str
    views: list[Tensor]


@cache
def trouble_with_compiled() -> str | None:
    """The reason why the CPU kernels cannot run here, and the fix; None if they can.

    The first call on a machine builds them.
    """
    try:
        _library()
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the CPU kernels cannot be loaded ({error}): remove the file, to build them again"
    return None


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built_library()))


def view(tensor: Tensor) -> View:
    """A tensor [T, n, C] or [T, C] as kernels take it."""
    token, *stream, column = tensor.stride()
    made = View(tensor.data_ptr(), _TYPES[tensor.dtype], token, *(stream or [0]), column)
    made.tensor = tensor  # which keeps its memory
    return made


def result(tensor: Tensor | None) -> View | None:
    """A dense tensor that a kernel fills; None for a result that is not wanted."""
    if tensor is None:
        return None
    if tensor.nbytes >= _LARGE:
        address = ctypes.c_void_p(tensor.data_ptr())
        _library().ask_for_large_pages(address, ctypes.c_int64(tensor.nbytes))
    return view(tensor)


def readable(tensor: Tensor) -> Tensor:
    """The tensor, in a dtype that kernels read."""
    return tensor if tensor.dtype in _TYPES else tensor.float()


_observer: Callable[[Call], None] | None = None


def call(name: str, dtype: torch.dtype, *arguments: Any, streams: Tensor) -> None:
    """Run a kernel.

    Args:
        name: A function of the library, without the suffix of its precision.
        dtype: float32 or float64, the precision of the arithmetic.
        *arguments: In the order of the function's parameters: views, structs, dense tensors,
            numbers, and None for what there is not.
        streams: The streams, for the amount of work.
    """
    if _observer is not None:
        _observer(Call(name, [a.tensor for a in arguments if isinstance(a, View)]))
    threads = torch.get_num_threads() if streams.numel() >= _LEAST_WORK else 1
    suffix = "double" if dtype == torch.float64 else "float"
    function = getattr(_library(), f"{name}_{suffix}")
    function(*(_argument(a) for a in (*arguments, threads)))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@contextmanager
def observe(observer: Callable[[Call], None]) -> Iterator[None]:
    """Within, tell an observer of every call of a kernel, before it runs."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
