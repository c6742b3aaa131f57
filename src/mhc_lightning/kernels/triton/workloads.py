"""Every kernel at work on one shape, to be tuned, compiled ahead of time, counted or timed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_lightning.kernels.triton.aggregate import (
    aggregate_backward,
    aggregate_forward,
    expand_backward,
    mean_backward,
    mean_forward,
)
from mhc_lightning.kernels.triton.coefficients import coefficients_backward, coefficients_forward
from mhc_lightning.kernels.triton.merge import merge_backward, merge_forward
from mhc_lightning.kernels.triton.project import project
from mhc_lightning.kernels.triton.read_backward import read_backward
from mhc_lightning.kernels.triton.seam import seam_forward
from mhc_lightning.kernels.triton.seam_backward import seam_backward
from mhc_lightning.kernels.triton.sinkhorn import sinkhorn_backward, sinkhorn_forward

ITERATIONS, EPS = 20, 1e-20


class Workload(NamedTuple):
    """A launching function with its arguments.

    Attributes:
        kernel: The kernel's name in the tables of block sizes.
        elements: The fewest stream-sized elements per token, in units of C, that it has to read
            and write; 0 if it touches none.
        run: Calls the launching function; returns what that returns.
    """

    kernel: str
    elements: int
    run: Callable[[], object]


def workloads(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    random: bool = True,
) -> dict[str, Workload]:
    """All kernels, by name, on common inputs.

    Args:
        tokens: Number of tokens.
        n: Number of streams.
        width: C.
        dtype: Dtype of the streams.
        device: Where the inputs are.
        random: Whether the inputs hold random numbers, or anything.
    """
    count = n * n + 2 * n

    def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        make = torch.randn if random else torch.empty
        return make(shape, dtype=kind, device=device)

    x, grad = tensor(tokens, n, width, kind=dtype), tensor(tokens, n, width, kind=dtype)
    y, read_grad = tensor(tokens, width, kind=dtype), tensor(tokens, width, kind=dtype)
    pre, post, residual = tensor(tokens, n), tensor(tokens, n), tensor(tokens, n, n)
    phi, alpha, bias = tensor(n * width, count), tensor(3), tensor(count)
    raw_grad, scale = tensor(count, tokens), tensor(tokens)
    stream_phi, stream_raw_grad = tensor(width, n + 2), tensor(n + 2, tokens * n)
    stream_scale = tensor(tokens * n)
    partials, squares, inverse_rms = tensor(2, count, tokens), tensor(2, tokens), tensor(tokens)
    logits, logits_grad = tensor(n, n, tokens), tensor(n, n, tokens)
    gates = (alpha, bias, n, n * width, ITERATIONS)

    def seam(given: Tensor | None) -> Callable[[], object]:
        return lambda: seam_forward(x, y, residual, post, phi, alpha, bias, given, EPS)

    def seam_back(single_pass: bool) -> Callable[[], object]:
        return lambda: seam_backward(
            *(x, y, residual, post, phi, raw_grad, scale, pre, read_grad, grad), single_pass
        )

    return {
        "aggregate_forward": Workload(
            "aggregate_forward", n + 1, lambda: aggregate_forward(x, pre)
        ),
        "aggregate_backward": Workload(
            "aggregate_backward",
            2 * n + 1,
            lambda: aggregate_backward(read_grad, x, pre, True, True),
        ),
        "merge_forward": Workload(
            "merge_forward", 2 * n + 1, lambda: merge_forward(x, y, residual, post)
        ),
        "merge_backward": Workload(
            "merge_backward",
            3 * n + 2,
            lambda: merge_backward(grad, x, y, residual, post, True, True, True),
        ),
        "mean_forward": Workload("aggregate_forward", n + 1, lambda: mean_forward(x)),
        "mean_backward": Workload("aggregate_backward", n + 1, lambda: mean_backward(y, n)),
        "expand_backward": Workload("aggregate_forward", n + 1, lambda: expand_backward(x)),
        "project": Workload("project", n, lambda: project(x, phi)),
        "project_per_stream": Workload("project", n, lambda: project(x, stream_phi, True)),
        "read_backward": Workload(
            "read_backward",
            3 * n + 1,
            lambda: read_backward(x, phi, raw_grad, scale, pre, read_grad, grad, True, True),
        ),
        "read_backward_per_stream": Workload(
            "read_backward",
            3 * n + 1,
            lambda: read_backward(
                *(x, stream_phi, stream_raw_grad, stream_scale, pre, read_grad, grad),
                *(True, True, True),
            ),
        ),
        "coefficients_forward": Workload(
            "coefficients_forward",
            0,
            lambda: coefficients_forward(partials, squares, *gates, EPS),
        ),
        "coefficients_backward": Workload(
            "coefficients_backward",
            0,
            lambda: coefficients_backward((pre, post, residual), raw_grad, inverse_rms, *gates),
        ),
        "sinkhorn_forward": Workload(
            "sinkhorn_forward", 0, lambda: sinkhorn_forward(logits, ITERATIONS)
        ),
        "sinkhorn_backward": Workload(
            "sinkhorn_backward", 0, lambda: sinkhorn_backward(logits_grad, logits, ITERATIONS)
        ),
        "seam_forward": Workload("seam_forward", 3 * n + 2, seam(None)),
        "seam_forward_single_pass": Workload("seam_forward", 2 * n + 2, seam(pre)),
        "seam_backward": Workload("seam_backward", 3 * n + 3, seam_back(False)),
        "seam_backward_single_pass": Workload("seam_backward", 3 * n + 3, seam_back(True)),
    }
