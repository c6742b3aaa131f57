"""The two ends of the streams: n copies of the embedding first, the mean of the streams last.

Neither end writes a tensor of all streams: expanding is a view, and so is the gradient of the mean.
"""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.expand_mean import reference
from mhc_lightning.kernels.precision import full_precision
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import transformable


def expand_streams(x: Tensor, num_streams: int) -> Tensor:
    """[..., C] -> [..., n, C], every stream a view of `x`; the gradient is the streams' sum."""
    return transformable(_Expand.apply, _expanded)(x, num_streams)


def mean_streams(streams: Tensor) -> Tensor:
    """[..., n, C] -> [..., C] in the dtype of `streams`, accumulated in float32."""
    *leading, n, width = streams.shape
    if n == 1:
        return streams.squeeze(-2)
    run = transformable(mean_op, reference.mean_forward)
    with full_precision(streams):
        mean = run(streams.reshape(-1, n, width))
    return mean.reshape(*leading, width)


def _expanded(x: Tensor, num_streams: int) -> Tensor:
    return x.unsqueeze(-2).expand(*x.shape[:-1], num_streams, -1)


class _Expand(torch.autograd.Function):
    """Expanding. It is no operator, since the result of an operator cannot be a view."""

    @staticmethod
    def forward(ctx, x, num_streams):  # type: ignore[no-untyped-def]
        return _expanded(x, num_streams)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        *leading, n, width = grad.shape
        run = transformable(sum_op, reference.expand_backward)
        return run(grad.reshape(-1, n, width)).reshape(*leading, width), None


@operator("mean_streams")
def mean_op(streams: Tensor) -> Tensor:
    """[T, n, C] -> [T, C]."""
    return implementation("expand_mean", streams).mean_forward(streams)


@operator("sum_streams")
def sum_op(streams: Tensor) -> Tensor:
    """[T, n, C] -> [T, C]."""
    return implementation("expand_mean", streams).expand_backward(streams)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.num_streams = inputs[0].shape[1]


def _mean_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _sum_backward(ctx, grad / ctx.num_streams)


def _sum_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.unsqueeze(1).expand(-1, ctx.num_streams, -1)  # [T, C] -> [T, n, C]


mean_op.register_autograd(_mean_backward, setup_context=_setup_context)
sum_op.register_autograd(_sum_backward, setup_context=_setup_context)
