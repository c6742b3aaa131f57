"""Triton kernels of the stream operations on plain tensors, without autograd."""
