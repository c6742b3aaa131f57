"""The parts of a language model: connections, attention, feed-forward networks, Transformer."""

from mhc_lightning.kernels import StreamMappings
from mhc_lightning.modules.attention import LatentAttention
from mhc_lightning.modules.connection import Connection, MappingsWindow, Unmerged
from mhc_lightning.modules.feed_forward import SwiGLU
from mhc_lightning.modules.hyper_connection import HyperConnection
from mhc_lightning.modules.manifold_hyper_connection import ManifoldHyperConnection
from mhc_lightning.modules.mixture_of_experts import MixtureOfExperts
from mhc_lightning.modules.residual_connection import ResidualConnection
from mhc_lightning.modules.single_pass_hyper_connection import SinglePassHyperConnection
from mhc_lightning.modules.transformer import Transformer

__all__ = [
    "Connection",
    "HyperConnection",
    "LatentAttention",
    "ManifoldHyperConnection",
    "MappingsWindow",
    "MixtureOfExperts",
    "ResidualConnection",
    "SinglePassHyperConnection",
    "StreamMappings",
    "SwiGLU",
    "Transformer",
    "Unmerged",
]
