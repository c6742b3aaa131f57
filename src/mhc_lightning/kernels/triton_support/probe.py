"""The least that a kernel can do, to find out whether any runs on a device."""

import torch
import triton
import triton.language as tl


@triton.jit
def _mark(target):
    tl.store(target, 1)


def launch_something(device: torch.device) -> None:
    """Compile and launch a kernel; an error of Triton passes through.

    The kernel does not go through `launch`, because nobody should count or time it.
    """
    target = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _mark[(1,)](target)
    else:
        _mark[(1,)](target)
