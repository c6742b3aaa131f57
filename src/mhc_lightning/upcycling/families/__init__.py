"""Adapters of model families, one file for each shape of block."""

from mhc_lightning.upcycling.families import llama  # noqa: F401
