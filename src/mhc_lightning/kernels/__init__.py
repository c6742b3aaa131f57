"""Functions on tensors: residual streams, and the loss. They know nothing of the package."""

from mhc_lightning.kernels.coefficients import stream_mappings
from mhc_lightning.kernels.cross_entropy import linear_cross_entropy, token_losses
from mhc_lightning.kernels.hyper import hyper_mappings
from mhc_lightning.kernels.read import read_streams
from mhc_lightning.kernels.record import StreamMappings
from mhc_lightning.kernels.sinkhorn import sinkhorn_knopp
from mhc_lightning.kernels.streams import aggregate_streams, merge_streams

__all__ = [
    "StreamMappings",
    "aggregate_streams",
    "hyper_mappings",
    "linear_cross_entropy",
    "merge_streams",
    "read_streams",
    "sinkhorn_knopp",
    "stream_mappings",
    "token_losses",
]
