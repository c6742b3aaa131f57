"""Pretrained residual networks made n streams wide, that compute the same function at first."""

from mhc_lightning.upcycling import families  # noqa: F401  registers its adapters
from mhc_lightning.upcycling.network import Network
from mhc_lightning.upcycling.pretrained_network import PretrainedNetwork
from mhc_lightning.upcycling.upcycle import upcycle
from mhc_lightning.upcycling.wide_block import Connect, WideBlock, wide_block

__all__ = ["Connect", "Network", "PretrainedNetwork", "WideBlock", "upcycle", "wide_block"]
