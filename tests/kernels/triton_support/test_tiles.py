"""How wide rows are read: what strides and widths allow, up to 16 bytes."""

import pytest
import torch

from mhc_lightning.kernels.triton_support.tiles import row_block, strides_in, vector_width


@pytest.mark.parametrize(
    ("width", "dtype", "vector"),
    [
        (2560, torch.bfloat16, 8),
        (2560, torch.float32, 4),
        (1000, torch.float16, 8),
        (1004, torch.bfloat16, 4),
        (1001, torch.bfloat16, 1),
    ],
)
def test_the_width_decides(width: int, dtype: torch.dtype, vector: int) -> None:
    assert vector_width(width, torch.empty(3, 4, width, dtype=dtype)) == vector


def test_strides_decide_too_but_not_those_of_a_single_row() -> None:
    streams = torch.empty(3, 4, 1002, dtype=torch.bfloat16)[..., :1000]
    assert vector_width(1000, streams) == 2
    assert vector_width(1000, torch.empty(1, 1, 1002, dtype=torch.bfloat16)[..., :1000]) == 8
    assert strides_in(2, streams) == (2004, 501, 1)
    copies = torch.empty(3, 1, 1000, dtype=torch.bfloat16).expand(3, 4, 1000)
    assert vector_width(1000, copies, streams) == 2
    assert strides_in(8, copies) == (125, 0, 1)


@pytest.mark.parametrize(
    ("width", "block"),
    [(4096, (1, 1024)), (2560, (2, 512)), (1280, (4, 256)), (1001, (4, 32)), (1004, (4, 128))],
)
def test_blocks_span_a_row_as_far_as_it_divides(width: int, block: tuple[int, int]) -> None:
    assert row_block(width, itemsize=2, warps=4) == block
