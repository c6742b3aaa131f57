"""The mean and the sum of the streams by the kernel that aggregates them."""

from torch import Tensor

from mhc_lightning.kernels.aggregate.triton import sum_streams


def mean_forward(streams: Tensor) -> Tensor:
    """The mean of the streams: [tokens, n, C], any strides -> [tokens, C], contiguous."""
    return sum_streams("mean_forward", streams, None, 1 / streams.shape[1])


def expand_backward(grad: Tensor) -> Tensor:
    """Gradient of copying a vector to n streams: their sum, [tokens, n, C] -> [tokens, C]."""
    return sum_streams("expand_backward", grad, None, 1.0)
