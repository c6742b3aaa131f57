"""Shared parts of all Triton kernels: tiles, launches, block sizes, chips, tuning."""
