"""Observation of a model's mappings: hooks, the order of sub-layers, chains of streams."""
