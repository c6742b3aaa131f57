import pytest
import torch
import triton
import triton.language as tl

from mhc_lightning.kernels.triton_support.launch import launch
from traffic_counter import TrafficCounter

TOKENS, N, WIDTH = 40, 3, 24


@triton.jit
def weighted_sum(
    x_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    n: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    shift: tl.constexpr,
):
    token = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.program_id(1) * wide + tl.arange(0, wide)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    total = tl.zeros((block, wide), tl.float32)
    for i in tl.static_range(n):
        at = shift + token[:, None] * (n * width) + i * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + token * n + i, mask=token < tokens, other=0.0)
        total += x * weight[:, None]
    tl.store(out_ptr + token[:, None] * width + column[None, :], total, mask=inside)


def run(streams: torch.Tensor, weights: torch.Tensor, shift: int = 0) -> torch.Tensor:
    out = torch.empty(TOKENS, WIDTH, dtype=streams.dtype)
    constants = {"n": N, "width": WIDTH, "block": 16, "wide": 16, "shift": shift}
    launch(
        weighted_sum,
        (3, 2),
        *(streams, weights, out, TOKENS),
        num_warps=1,
        num_stages=1,
        **constants,
    )
    return out


@pytest.fixture
def arguments() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(TOKENS, N, WIDTH, dtype=torch.float16), torch.rand(TOKENS, N)


def test_counts_unmasked_elements_and_repeated_reads(arguments):
    streams, weights = arguments
    with TrafficCounter(TOKENS, WIDTH) as counter:
        out = run(streams, weights)
        run(streams, weights)
    expected = torch.einsum("tnc,tn->tc", streams.float(), weights)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-3)
    assert counter.launches == 2
    assert counter.stream_bytes == 2 * (N + 1) * WIDTH * 2
    assert counter.other_bytes == 2 * N * 4
    assert counter.repeated_bytes == 2 * N * 4  # two programs across the width read the weights
    assert "| weighted_sum | x_ptr | yes | 288.0 | 0.0 | 288.0 | 0.0 |" in counter.table()
    run(streams, weights)
    assert counter.launches == 2


def test_counts_what_torch_moves_between_launches(arguments):
    streams, weights = arguments
    with TrafficCounter(TOKENS, WIDTH) as counter:
        wide = streams.view(TOKENS, N * WIDTH).float()  # reads 2, writes 4 bytes per element
        wide.add_(1.0)  # 4 + 4
        torch.empty_like(wide).copy_(wide)  # 4 + 4
        wide[:, None, :WIDTH].expand(-1, 2, -1).contiguous()  # reads C, writes 2 C
        weights.sum(0)  # small
    assert counter.bytes_per_token == WIDTH * (N * (2 + 4 + 8 + 8) + 3 * 4)
    with TrafficCounter(TOKENS, WIDTH, glue=False) as counter:
        streams.float()
    assert counter.bytes_per_token == 0


def test_counts_inside_an_operator_of_the_package(arguments):
    streams, weights = arguments
    with torch.library._scoped_library("mhc_lightning", "FRAGMENT") as library:
        library.define("counted_for_a_test(Tensor streams, Tensor weights) -> Tensor")

        def operator(streams, weights):
            return run(streams.clone(), weights)

        library.impl("counted_for_a_test", operator, "CompositeExplicitAutograd")
        with TrafficCounter(TOKENS, WIDTH) as counter:
            torch.ops.mhc_lightning.counted_for_a_test(streams, weights)
    assert counter.stream_bytes == WIDTH * 2 * (2 * N + N + 1)


def test_an_access_outside_of_every_argument_is_refused(arguments):
    streams, weights = arguments
    with TrafficCounter(TOKENS, WIDTH), pytest.raises(Exception, match="no argument holds"):
        run(streams, weights, shift=1)
