"""The one door through which every Triton kernel of this package is launched."""

from typing import Any


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Run ``kernel`` over ``grid``; a grid without programs (an empty batch) launches nothing.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs along up to three axes.
        *args: Tensors and run-time scalars, in the order of the kernel's signature.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
        **constants: The kernel's ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
