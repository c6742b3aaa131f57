"""Triton kernels of the stream operations, on plain tensors; ``kernels/`` makes operators of them."""
