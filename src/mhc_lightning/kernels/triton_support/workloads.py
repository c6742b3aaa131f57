"""Every kernel with arguments of one shape, to be tuned, compiled ahead, counted or timed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_lightning.kernels.aggregate.triton import aggregate_backward, aggregate_forward
from mhc_lightning.kernels.backend import MOST_FUSED_STREAMS
from mhc_lightning.kernels.context_gate.operands import GateOperands
from mhc_lightning.kernels.context_gate.triton import gate_backward, gate_forward
from mhc_lightning.kernels.expand_mean.triton import expand_backward, mean_forward
from mhc_lightning.kernels.gated_write.operands import WriteOperands
from mhc_lightning.kernels.gated_write.triton import write_backward, write_forward
from mhc_lightning.kernels.mappings import MappingGrads, StreamMappings
from mhc_lightning.kernels.merge.triton import merge_backward, merge_forward
from mhc_lightning.kernels.merge_read.triton.merge_project import merge_project
from mhc_lightning.kernels.merge_read.triton.merge_project_backward import merge_project_backward
from mhc_lightning.kernels.read.triton.coefficients import (
    coefficients_backward,
    coefficients_forward,
)
from mhc_lightning.kernels.read.triton.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)
from mhc_lightning.kernels.read.triton.project import project
from mhc_lightning.kernels.read.triton.project_backward import project_backward
from mhc_lightning.kernels.replay.triton import replay_forward
from mhc_lightning.kernels.sinkhorn.triton import sinkhorn_backward, sinkhorn_forward

ITERATIONS, EPS = 20, 1e-20
TAPS, DILATION = 4, 3  # of Engram's convolution


class Workload(NamedTuple):
    """A launching function with its arguments.

    Attributes:
        elements: The fewest stream-sized elements per token, in units of C, that the function has
            to read and write; 0 if it touches none.
        run: Calls the launching function, and returns its result.
    """

    elements: int
    run: Callable[[], object]


def workloads(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    random: bool = True,
    sub_layers: int = 4,
) -> dict[str, Workload]:
    """All kernels, by their names in the tables of block sizes, as training runs them.

    Args:
        tokens: Number of tokens.
        n: Number of streams.
        width: C.
        dtype: Dtype of the streams.
        device: Device of the inputs.
        random: True for random inputs, False for uninitialised ones.
        sub_layers: Number of sub-layers of the recompute block that is replayed, at least 1.
    """
    count = n * n + 2 * n

    def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        make = torch.randn if random else torch.empty
        return make(shape, dtype=kind, device=device)

    x, grad = tensor(tokens, n, width, kind=dtype), tensor(tokens, n, width, kind=dtype)
    y, read_grad = tensor(tokens, width, kind=dtype), tensor(tokens, width, kind=dtype)
    pre, post, residual = tensor(tokens, n), tensor(tokens, n), tensor(tokens, n, n)
    phi, alpha, bias = tensor(n * width, count), tensor(3), tensor(count)
    products, squares = tensor(1, count, tokens), tensor(1, tokens).square()
    raw, inverse_rms = tensor(count, tokens), tensor(tokens)
    # The same for Hyper-Connections, where each stream is projected by itself.
    rows = tokens * n
    phi_1, alpha_1 = tensor(width, n + 2), tensor(2)
    products_1, squares_1 = tensor(1, n + 2, rows), tensor(1, rows).square()
    raw_1, inverse_rms_1 = tensor(n + 2, rows), tensor(rows)
    logits, logits_grad = tensor(n, n, tokens), tensor(n, n, tokens)

    gates = (alpha, bias, n, n * width, ITERATIONS)
    gates_1 = (n, width, True)
    grads = MappingGrads(pre, post, residual)
    mappings = StreamMappings(pre, post, residual)
    outputs = [tensor(tokens, width, kind=dtype) for _ in range(sub_layers - 1)]
    replayed = (outputs, [mappings] * sub_layers, [False, *[True] * (sub_layers - 1)])
    merged = (x, y, residual, post)
    compared = GateOperands(x, tensor(tokens, n, width, kind=dtype), tensor(n, width))
    written = WriteOperands(y[None], pre[None], None, 1)
    convolved = written._replace(taps=tensor(TAPS, n, width), dilation=DILATION)
    of_reading = (raw, inverse_rms, pre, read_grad, grad)
    calls: dict[str, tuple[int, Callable[..., object], tuple[Any, ...]]] = {
        "aggregate_forward": (n + 1, aggregate_forward, (x, pre)),
        "aggregate_backward": (2 * n + 1, aggregate_backward, (read_grad, x, pre, True, True)),
        "aggregate_backward_of_pre": (n + 1, aggregate_backward, (read_grad, x, pre, False, True)),
        "mean_forward": (n + 1, mean_forward, (x,)),
        "expand_backward": (n + 1, expand_backward, (x,)),
        "merge_forward": (2 * n + 1, merge_forward, merged),
        "merge_backward": (3 * n + 2, merge_backward, (grad, *merged, True, True, True)),
        # The kernel reads the entry and all outputs but the last. It writes all streams but the
        # first, and all inputs.
        "replay_forward": (
            *(sub_layers * (n + 2) - 1, replay_forward),
            (x, *replayed, [True] * sub_layers),
        ),
        "project": (n, project, (x, phi)),
        "project_per_stream": (n, project, (x, phi_1, True)),
        "project_backward": (3 * n + 1, project_backward, (x, phi, *of_reading, True, True)),
        "project_backward_per_stream": (
            *(3 * n + 1, project_backward),
            (x, phi_1, raw_1, inverse_rms_1, *of_reading[2:], True, True, True),
        ),
        "merge_project": (3 * n + 2, merge_project, (*merged, phi, alpha, bias, None, EPS)),
        "merge_project_single_pass": (
            *(2 * n + 2, merge_project),
            (*merged, phi, alpha, bias, pre, EPS),
        ),
        "merge_project_backward": (
            *(3 * n + 3, merge_project_backward),
            (*merged, phi, *of_reading, False),
        ),
        "merge_project_backward_single_pass": (
            *(3 * n + 3, merge_project_backward),
            (*merged, phi, *of_reading, True),
        ),
        "context_gate_forward": (2 * n, gate_forward, (compared, EPS)),
        "context_gate_backward": (
            *(5 * n, gate_backward),
            (compared, pre, pre, post, grad, post),
        ),
        "gated_write_forward": (2 * n + 1, write_forward, (x[None], written)),
        "gated_write_backward": (n + 2, write_backward, (grad[None], written)),
        # Every tap is loaded by itself, and caches serve all but the first: in backward a gradient
        # for each tap, and the values at all positions that meet in an output. Beside the kernels
        # the value is read for its norm, and once more for the gradient that comes through it.
        "gated_write_forward_convolved": (
            *(2 * n + TAPS + 1, write_forward),
            (x[None], convolved),
        ),
        "gated_write_backward_convolved": (
            *(n * TAPS + 2 * TAPS + 4, write_backward),
            (grad[None], convolved),
        ),
        "coefficients_forward": (0, coefficients_forward, (products, squares, *gates, EPS)),
        "coefficients_backward": (0, coefficients_backward, (grads, raw, inverse_rms, *gates)),
        "hyper_coefficients_forward": (
            *(0, hyper_coefficients_forward),
            (products_1, squares_1, alpha_1, bias, *gates_1, EPS),
        ),
        "hyper_coefficients_backward": (
            *(0, hyper_coefficients_backward),
            (grads, raw_1, inverse_rms_1, alpha_1, *gates_1),
        ),
        "sinkhorn_forward": (0, sinkhorn_forward, (logits, ITERATIONS)),
        "sinkhorn_backward": (0, sinkhorn_backward, (logits_grad, logits, ITERATIONS)),
    }
    return {
        name: Workload(elements, partial(function, *arguments))
        for name, (elements, function, arguments) in calls.items()
        if n <= MOST_FUSED_STREAMS or not name.startswith("merge_project")
    }
