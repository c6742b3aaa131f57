"""Choice of an implementation: Triton on a GPU, compiled kernels on a CPU, or plain torch."""

import os
import sys
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mhc_lightning.errors import UserError
from mhc_lightning.kernels.compiled_support.library import trouble_with_compiled
from mhc_lightning.kernels.transforms import ordinary
from mhc_lightning.kernels.triton_support.availability import trouble_with_triton

VARIABLE = "MHC_LIGHTNING_KERNELS"
_MOST_STREAMS = 8
_MOST_COEFFICIENTS = 32  # or n² + 2n, if those are more
MOST_FUSED_STREAMS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED = frozenset({"aggregate", "merge", "merge_read", "read", "replay", "sinkhorn"}) | {
    "context_gate",
    "gated_write",
}
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def implementation(operator: str, streams: Tensor, *coefficients: Tensor) -> ModuleType:
    """The module that computes an operator of these operands.

    The environment variable `MHC_LIGHTNING_KERNELS` is `auto` (the default), `compiled`, `triton`
    or `torch`. Triton's kernels run on a GPU or under `TRITON_INTERPRET=1`. They take up to 8
    streams of float32, bfloat16 or float16 with float32 coefficients, at most 32 or n² + 2n per
    token.
    Compiled kernels run on a CPU and take up to 8 streams of float32, bfloat16 or float64. The
    first use on a machine builds them. Other operands run in plain torch. Under `auto`, where
    Triton is missing or broken, or the CPU kernels cannot be built, all operands run in plain
    torch, with a warning. Tensors without numbers take plain torch, for the shapes of its results.

    Args:
        operator: A folder of `mhc_lightning.kernels`, such as `"merge"`.
        streams: [..., n, C].
        *coefficients: Mappings or parameters.

    Returns:
        `mhc_lightning.kernels.<operator>.triton`, `….compiled` or `….reference`.

    Raises:
        UserError: The variable has another value, or names kernels that do not work here.
    """
    name = "reference"
    if not streams.is_meta and not isinstance(streams, FakeTensor):
        if _triton_runs(streams, coefficients):
            name = "triton"
        elif operator in _COMPILED and streams.numel() and _compiled_runs(streams, coefficients):
            name = "compiled"
    return _module(operator, name)


@cache
def _module(operator: str, name: str) -> ModuleType:
    return import_module(f"{__package__}.{operator}.{name}")


def fuses_seams(streams: Tensor, *coefficients: Tensor) -> bool:
    """True if merging and reading run as one kernel, which moves less than two.

    Compiled kernels fuse them for up to 8 streams.
    Triton fuses them for up to 4 streams on NVIDIA's chips of compute capability 8.0 or more. More
    streams do not fit the registers of a program. The kernel's tiles do not fit the shared memory
    of AMD's chips.
    """
    if _compiled_runs(streams, coefficients):
        return True
    fits = streams.shape[-2] <= MOST_FUSED_STREAMS and torch.version.hip is None
    if streams.is_cuda:
        fits = fits and torch.cuda.get_device_capability(streams.device) >= (8, 0)
    return fits and _triton_runs(streams, coefficients)


def _triton_runs(streams: Tensor, coefficients: tuple[Tensor, ...]) -> bool:
    choice = _choice()
    if choice in ("torch", "compiled") or not _fits(streams, coefficients):
        return False
    if not streams.is_cuda:
        if choice == "auto":
            return False
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"{VARIABLE}=triton, but the streams are on {streams.device.type}; train on a GPU,"
                " or set TRITON_INTERPRET=1 to have the kernels interpreted (slowly)"
            )
    # Under a tracer nothing can be found out about Triton: the operators ask again when they run.
    trouble = trouble_with_triton(streams.device) if ordinary(streams) else None
    return not _stopped_by(trouble, "triton")


def _compiled_runs(streams: Tensor, coefficients: tuple[Tensor, ...]) -> bool:
    choice = _choice()
    if choice not in ("auto", "compiled") or not _fits_compiled(streams, coefficients):
        return False
    if choice == "auto" and not sys.platform.startswith("linux"):
        return False  # nobody can mend that, so nothing is said
    # Under a tracer nothing is built: the operators ask again when they run.
    trouble = trouble_with_compiled() if ordinary(streams) else None
    return not _stopped_by(trouble, "compiled")


def _stopped_by(trouble: str | None, kernels: str) -> bool:
    """True if there is trouble, which is said once; an error if the user named the kernels."""
    if trouble is None:
        return False
    if _choice() == kernels:
        raise UserError(f"{VARIABLE}={kernels}, but these kernels cannot run: {trouble}")
    _warn_once(trouble)
    return True


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "compiled", "torch", "triton"):
        raise UserError(f"{VARIABLE} is {choice!r}; set it to auto, compiled, triton or torch")
    return choice


def _fits_compiled(streams: Tensor, coefficients: tuple[Tensor, ...]) -> bool:
    computed = coefficients[0].dtype if coefficients else streams.dtype
    return (
        streams.device.type == "cpu"
        and streams.dtype in _COMPILED_DTYPES
        and 1 <= streams.shape[-2] <= _MOST_STREAMS
        and computed in (torch.float32, torch.float64)
        and all(t.dtype == computed for t in coefficients)
    )


def _fits(streams: Tensor, coefficients: tuple[Tensor, ...]) -> bool:
    n = streams.shape[-2]
    most = max(_MOST_COEFFICIENTS, n * n + 2 * n)
    return (
        streams.dtype in _DTYPES
        and n <= _MOST_STREAMS
        and all(t.dtype == torch.float32 and t.shape[-1] <= most for t in coefficients)
    )


@cache
def _warn_once(trouble: str) -> None:
    warnings.warn(
        f"{trouble}. Until then the stream operations run in plain torch, which is slower;"
        f" {VARIABLE}=torch silences this warning",
        stacklevel=2,
    )
