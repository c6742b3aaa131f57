"""Optimizer recipes: parameter groups, AdamW and Muon, the learning rate's schedule."""

from mhc_lightning.optimizers.recipes import AdamW, Muon

__all__ = ["AdamW", "Muon"]
