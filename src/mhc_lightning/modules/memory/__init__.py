"""Memories of n-grams: Engram in the blocks, Over-Encoding at the embedding."""

from mhc_lightning.modules.memory.engram import Engram
from mhc_lightning.modules.memory.memory import (
    BlockMemory,
    HeadMemory,
    InputMemory,
    Memory,
    Recalled,
)
from mhc_lightning.modules.memory.over_encoding import OverEncoding
from mhc_lightning.modules.memory.table import NgramTable

__all__ = [
    "BlockMemory",
    "Engram",
    "HeadMemory",
    "InputMemory",
    "Memory",
    "NgramTable",
    "OverEncoding",
    "Recalled",
]
