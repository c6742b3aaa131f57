"""The stream operations as Triton kernels, without autograd; see ``kernels.reference``."""

from mhc_lightning.kernels.triton.aggregate import (
    aggregate_backward,
    aggregate_forward,
    expand_backward,
    mean_forward,
)
from mhc_lightning.kernels.triton.merge import merge_backward, merge_forward
from mhc_lightning.kernels.triton.reading import read_backward, read_forward
from mhc_lightning.kernels.triton.replay import replay_forward
from mhc_lightning.kernels.triton.seam import seam_backward, seam_forward
from mhc_lightning.kernels.triton.sinkhorn import sinkhorn_backward, sinkhorn_forward

__all__ = [
    "aggregate_backward",
    "aggregate_forward",
    "expand_backward",
    "mean_forward",
    "merge_backward",
    "merge_forward",
    "read_backward",
    "read_forward",
    "replay_forward",
    "seam_backward",
    "seam_forward",
    "sinkhorn_backward",
    "sinkhorn_forward",
]
