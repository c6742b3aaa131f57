"""Precision of the kernels' matrix products, by the dtype of the streams."""

from torch import Tensor

from mhc_lightning.kernels.triton_support.target import target_of


def product_precision(streams: Tensor) -> str:
    """Triton's `input_precision` for products with float32 parameters.

    16-bit streams take TF32, as in arXiv 2512.24880 (eq. 10): their own rounding is coarser.
    float32 streams take three TF32 products, which is float32 to rounding; AMD's chips have plain
    float32 products instead.

    Args:
        streams: The streams, for their dtype and their device.
    """
    if streams.element_size() < 4:
        return "tf32"
    return "ieee" if target_of(streams).backend == "hip" else "tf32x3"
