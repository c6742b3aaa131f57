"""Adapters of model families, one file for each shape of block."""

from mhc_lightning.upcycling.families import (  # noqa: F401
    diffusion,
    llama,
    parallel,
    pre_norm,
    sandwich,
    vision,
)
