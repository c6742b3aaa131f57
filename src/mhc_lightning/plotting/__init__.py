"""Figures drawn with matplotlib: their common theme, gain profiles and matrix heat maps."""
