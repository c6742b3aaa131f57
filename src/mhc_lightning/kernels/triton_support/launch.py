"""The one door through which every Triton kernel of this package is launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: A `triton.jit` function.
        grid: Programs along up to three axes; none is 0.
        args: Tensors and run-time scalars, in the order of the kernel's signature.
        constants: The kernel's `tl.constexpr` parameters.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options. The one for fused operations is explicit, since its default changes."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Launch the kernel on the device of its tensors, whichever device is current."""
        tensor = next(argument for argument in self.args if isinstance(argument, torch.Tensor))
        on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
        with on_device:
            self.kernel[self.grid](*self.args, **self.constants, **self.options)


_handler: Callable[[Launch], None] = Launch.run


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`; a grid without programs (an empty batch) launches nothing.

    Args:
        kernel: A `triton.jit` function.
        grid: Programs along up to three axes.
        *args: Tensors and run-time scalars, in the order of the kernel's signature.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
        **constants: The kernel's `tl.constexpr` parameters.
    """
    if 0 not in grid:
        _handler(Launch(kernel, grid, args, constants, num_warps, num_stages))


@contextmanager
def intercept(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Within, hand every launch of this process to `handler` instead, which may `run` it.

    Measurements use this to count what a launch reads, or to compile a launch without running it.
    """
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before
