"""Which kernels run: Triton's on a GPU, plain torch elsewhere, or what the user says."""

import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import reference

VARIABLE = "MHC_LIGHTNING_KERNELS"
_MOST_STREAMS = 8
_MOST_COEFFICIENTS = 32  # or n² + 2n, if those are more
MOST_FUSED_STREAMS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend_of(streams: Tensor, *coefficients: Tensor) -> ModuleType:
    """The module whose functions run the stream operations on these operands.

    The environment variable ``MHC_LIGHTNING_KERNELS`` says ``auto`` (the default), ``triton`` or
    ``torch``. Triton's kernels take up to 8 streams of float32, bfloat16 or float16 with float32
    coefficients, of which a token has at most 32 or n² + 2n, on a GPU or under
    ``TRITON_INTERPRET=1``; whatever else goes to plain torch.

    Args:
        streams: [..., n, C].
        *coefficients: Mappings or parameters.

    Raises:
        UserError: If the variable says something else, or ``triton`` where there is none.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "torch", "triton"):
        raise UserError(f"{VARIABLE} is {choice!r}; set it to auto, triton or torch")
    if choice == "torch" or not _fits(streams, coefficients):
        return reference
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "auto" and not streams.is_cuda:
        return reference
    if not _has_triton():
        if choice == "triton":
            raise UserError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton")
        _warn_once()
        return reference
    if not streams.is_cuda and not interpreted:
        raise UserError(
            f"{VARIABLE}=triton, but the streams are on {streams.device.type}; train on a GPU, or "
            "set TRITON_INTERPRET=1 to have the kernels interpreted (slowly)"
        )
    from mhc_lightning.kernels import triton

    return triton


def fuses_seams(streams: Tensor, *coefficients: Tensor) -> bool:
    """Whether merging and reading run as one kernel, and so move less than one after the other.

    They do for Triton on NVIDIA's chips of compute capability 8.0 or more and up to 4 streams; more
    would not fit the registers of a program, nor its tiles the shared memory of AMD's.
    """
    fits = streams.shape[-2] <= MOST_FUSED_STREAMS and torch.version.hip is None
    if streams.is_cuda:
        fits = fits and torch.cuda.get_device_capability(streams.device) >= (8, 0)
    return fits and backend_of(streams, *coefficients) is not reference


def _fits(streams: Tensor, coefficients: tuple[Tensor, ...]) -> bool:
    n = streams.shape[-2]
    most = max(_MOST_COEFFICIENTS, n * n + 2 * n)
    return (
        streams.dtype in _DTYPES
        and n <= _MOST_STREAMS
        and all(t.dtype == torch.float32 and t.shape[-1] <= most for t in coefficients)
    )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _warn_once() -> None:
    warnings.warn(
        "Triton is not installed, so the stream operations run in plain torch, which is slower on "
        "a GPU; pip install triton",
        stacklevel=2,
    )
