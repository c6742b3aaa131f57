"""Functions on tensors: the arithmetic of residual streams. Knows nothing of the package."""

from mhc_lightning.kernels.coefficients import stream_mappings
from mhc_lightning.kernels.hyper import hyper_mappings
from mhc_lightning.kernels.read import read_streams
from mhc_lightning.kernels.record import StreamMappings
from mhc_lightning.kernels.sinkhorn import sinkhorn_knopp
from mhc_lightning.kernels.streams import aggregate_streams, merge_streams

__all__ = [
    "StreamMappings",
    "aggregate_streams",
    "hyper_mappings",
    "merge_streams",
    "read_streams",
    "sinkhorn_knopp",
    "stream_mappings",
]
