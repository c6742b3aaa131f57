"""The stream operations in plain torch, forward and backward by hand, without autograd.

They run wherever torch does, in float64 too, and say what the Triton kernels have to compute.
"""

from mhc_lightning.kernels.reference.coefficients import (
    coefficients_backward,
    coefficients_forward,
)
from mhc_lightning.kernels.reference.reading import read_backward, read_forward
from mhc_lightning.kernels.reference.replay import replay_forward
from mhc_lightning.kernels.reference.sinkhorn import sinkhorn_backward, sinkhorn_forward
from mhc_lightning.kernels.reference.streams import (
    aggregate_backward,
    aggregate_forward,
    expand_backward,
    mean_forward,
    merge_backward,
    merge_forward,
)

__all__ = [
    "aggregate_backward",
    "aggregate_forward",
    "coefficients_backward",
    "coefficients_forward",
    "expand_backward",
    "mean_forward",
    "merge_backward",
    "merge_forward",
    "read_backward",
    "read_forward",
    "replay_forward",
    "sinkhorn_backward",
    "sinkhorn_forward",
]
