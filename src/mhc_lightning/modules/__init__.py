"""The parts of a language model: connections, attention, feed-forward networks, Transformer."""

from mhc_lightning.kernels import StreamMappings
from mhc_lightning.modules.attention import LatentAttention
from mhc_lightning.modules.connection import Connection, MappingsWindow, Unmerged
from mhc_lightning.modules.feed_forward import SwiGLU
from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection
from mhc_lightning.modules.hyper_connection import HyperConnection
from mhc_lightning.modules.identity_hyper_connection import IdentityHyperConnection
from mhc_lightning.modules.kronecker_hyper_connection import KroneckerHyperConnection
from mhc_lightning.modules.manifold_hyper_connection import ManifoldHyperConnection
from mhc_lightning.modules.memory import Engram, Memory, NgramTable, OverEncoding
from mhc_lightning.modules.mixture_of_experts import MixtureOfExperts
from mhc_lightning.modules.permutation_hyper_connection import PermutationHyperConnection
from mhc_lightning.modules.residual_connection import ResidualConnection
from mhc_lightning.modules.single_pass_hyper_connection import SinglePassHyperConnection
from mhc_lightning.modules.transformer import Transformer

__all__ = [
    "Connection",
    "Engram",
    "GatedHyperConnection",
    "HyperConnection",
    "IdentityHyperConnection",
    "KroneckerHyperConnection",
    "LatentAttention",
    "ManifoldHyperConnection",
    "MappingsWindow",
    "Memory",
    "MixtureOfExperts",
    "NgramTable",
    "OverEncoding",
    "PermutationHyperConnection",
    "ResidualConnection",
    "SinglePassHyperConnection",
    "StreamMappings",
    "SwiGLU",
    "Transformer",
    "Unmerged",
]
