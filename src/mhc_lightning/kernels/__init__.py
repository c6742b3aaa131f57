"""Functions on tensors, for residual streams and the loss, independent of networks and training."""

from mhc_lightning.kernels.aggregate import aggregate_streams
from mhc_lightning.kernels.backend import fuses_seams
from mhc_lightning.kernels.context_gate import context_gates
from mhc_lightning.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy, token_losses
from mhc_lightning.kernels.expand_mean import expand_streams, mean_streams
from mhc_lightning.kernels.gated_write import gated_write
from mhc_lightning.kernels.mappings import StreamMappings
from mhc_lightning.kernels.merge import merge_streams
from mhc_lightning.kernels.merge_read import merge_and_read
from mhc_lightning.kernels.observers import merge_observers, note_merge
from mhc_lightning.kernels.read import (
    hyper_mappings,
    read_hyper_streams,
    read_streams,
    stream_mappings,
)
from mhc_lightning.kernels.replay import replay_streams
from mhc_lightning.kernels.sinkhorn import sinkhorn_knopp

__all__ = [
    "IGNORE_INDEX",
    "StreamMappings",
    "aggregate_streams",
    "context_gates",
    "expand_streams",
    "fuses_seams",
    "gated_write",
    "hyper_mappings",
    "linear_cross_entropy",
    "mean_streams",
    "merge_and_read",
    "merge_observers",
    "merge_streams",
    "note_merge",
    "read_hyper_streams",
    "read_streams",
    "replay_streams",
    "sinkhorn_knopp",
    "stream_mappings",
    "token_losses",
]
