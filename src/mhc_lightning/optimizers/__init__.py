"""Optimizer recipes (AdamW, Muon), the learning rate's schedule, and saved optimizer state."""

from mhc_lightning._moved import renamed
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe

__all__ = ["AdamWRecipe", "MuonRecipe", "OptimizerRecipe"]

__getattr__ = renamed(__name__, {"AdamW": "AdamWRecipe", "Muon": "MuonRecipe"})
