"""Figures that others published of their kernels: theirs, on their hardware, none measured here.

Bandwidths are the fewest bytes an operation has to move over the time given; where only a time was
published, the bytes are counted as for our kernels. A share of the roof is given only where the GPU
is known: of the data sheet's bandwidth, since nobody published that of a copy.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One figure.

    Attributes:
        who: The implementation.
        where: The public thread that gives it.
        hardware: The GPU, as far as it is told.
        operation: In our terms.
        shape: Tokens and width; n = 4 and bfloat16 everywhere.
        bandwidth: Bytes per second.
        roof: The data sheet's bandwidth of that GPU, bytes per second; None if the GPU is unknown.
    """

    who: str
    where: str
    hardware: str
    operation: str
    shape: str
    bandwidth: float
    roof: float | None = None

    @property
    def share(self) -> float | None:
        """Of the roof."""
        return self.bandwidth / self.roof if self.roof else None


_GB200 = 8.0e12


def _megatron(operation: str, bandwidth: float) -> Published:
    who, where, shape = "Megatron-LM, cuTile", "Megatron-LM #3828", "32,768 x 7168"
    return Published(who, where, "GB200", operation, shape, bandwidth, _GB200)


def _projection(who: str, operation: str, width: int, bandwidth: float) -> Published:
    return Published(
        *(who, "TransformerEngine #2978", "not told"),
        *(operation, f"4,096 x {width}", bandwidth),
    )


def _post(who: str, tokens: str, width: int, bandwidth: float) -> Published:
    return Published(
        *(who, "quack #130", "not told"), *("merge_forward", f"{tokens} x {width}", bandwidth)
    )


PUBLISHED = [
    _megatron("merge_forward", 6.18e12),
    _megatron("merge_backward", 2.58e12),
    _megatron("aggregate_forward", 6.73e12),
    _megatron("aggregate_backward", 6.40e12),
    _megatron("project", 4.41e12),
    _megatron("project_backward", 2.44e12),
    _projection("TransformerEngine, deterministic", "project", 4096, 2.014e12),
    _projection("TransformerEngine, non-deterministic", "project", 4096, 3.490e12),
    _projection("TransformerEngine, deterministic", "project_backward", 3072, 1.821e12),
    _projection("TransformerEngine, non-deterministic", "project_backward", 3072, 2.238e12),
    _projection("TileKernels", "project", 3072, 1.934e12),
    _projection("TileKernels", "project_backward", 3072, 0.574e12),
    _post("quack, CuTeDSL", "8,192", 7168, 6.496e12),
    _post("TileLang", "8,192", 7168, 6.401e12),
    _post("quack, CuTeDSL", "8,192", 2560, 5.929e12),
    _post("TileLang", "8,192", 2560, 5.772e12),
]
