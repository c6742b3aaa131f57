"""What all Triton kernels share: tiles, launches, block sizes, chips, tuning."""
