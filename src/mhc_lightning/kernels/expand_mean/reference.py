"""The mean and the sum of the streams in plain torch."""

from torch import Tensor


def mean_forward(streams: Tensor) -> Tensor:
    """The mean of the streams: [T, n, C] -> [T, C], in their dtype, contiguous."""
    return streams.mean(1).contiguous()


def expand_backward(grad: Tensor) -> Tensor:
    """Gradient of the expanded tensor, the sum of the streams' gradients: [T, n, C] -> [T, C]."""
    return grad.sum(1).contiguous()
