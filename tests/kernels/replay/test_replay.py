"""Replaying a stretch of sub-layers, against merging and aggregating one after the other."""

import itertools

import pytest
import torch
from accuracy import randn
from balanced import balanced
from layouts import LAYOUTS, laid_out
from torch import Tensor

from mhc_lightning.kernels import (
    StreamMappings,
    aggregate_streams,
    expand_streams,
    merge_streams,
    replay_streams,
)
from mhc_lightning.kernels.aggregate.triton import aggregate_forward
from mhc_lightning.kernels.merge.triton import merge_forward
from mhc_lightning.kernels.replay import reference, triton
from mhc_lightning.kernels.replay.triton import replay_forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_CHOICE = list(itertools.product([True, False], repeat=3))


def stretch(tokens: int, n: int, layers: int) -> list[StreamMappings]:
    return [
        StreamMappings(
            torch.rand(tokens, n),
            2 * torch.rand(tokens, n),
            torch.rand(tokens, n, n).softmax(-1),
        )
        for _ in range(layers)
    ]


def one_by_one(
    entry: Tensor, outputs: list[Tensor], mappings: list[StreamMappings]
) -> tuple[list[Tensor], list[Tensor]]:
    streams = [entry]
    for output, record in zip(outputs, mappings, strict=False):
        streams.append(merge_forward(streams[-1], output, record.residual, record.post))
    reads = [aggregate_forward(x, r.pre) for x, r in zip(streams, mappings, strict=True)]
    return streams, reads


@balanced(
    16,
    tokens=[0, 1, 3],
    n=range(1, 9),
    width=[1, 8, 20, 132],
    dtype=DTYPES,
    output_dtype=DTYPES,
    layout=LAYOUTS,
    output_layout=LAYOUTS,
    layers=[1, 2, 3, 3],
    want_streams=EVERY_CHOICE,
    want_reads=EVERY_CHOICE,
)
def test_equals_the_separate_kernels_bit_by_bit(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    layout: str,
    output_layout: str,
    layers: int,
    want_streams: tuple[bool, ...],
    want_reads: tuple[bool, ...],
) -> None:
    want_streams = (False, *want_streams[1:layers])
    want_reads = want_reads[:layers]
    entry = laid_out(layout, randn(tokens, n, width, dtype=dtype))
    outputs = [
        laid_out(output_layout, randn(tokens, width, dtype=output_dtype)) for _ in range(layers - 1)
    ]
    mappings = stretch(tokens, n, layers)
    streams, reads = replay_forward(entry, outputs, mappings, want_streams, want_reads)
    expected = one_by_one(entry, outputs, mappings)
    for ours, theirs, wanted in zip(
        streams + reads, [*expected[0], *expected[1]], want_streams + want_reads, strict=True
    ):
        assert (ours is None) == (not wanted)
        if ours is not None:
            assert ours.is_contiguous() and ours.dtype == dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layers", [4, 5, 6, 7])
def test_long_stretches_take_several_launches(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MOST_MERGES", 2)
    mappings, entry = stretch(3, 2, layers), randn(3, 2, 8)
    outputs = [randn(3, 8) for _ in range(layers - 1)]
    expected_streams, expected_reads = one_by_one(entry, outputs, mappings)
    everything, nothing = [True] * layers, [False] * layers
    streams, reads = replay_forward(entry, outputs, mappings, [False, *everything[1:]], everything)
    assert streams[0] is None
    for ours, theirs in zip(
        streams[1:] + reads, expected_streams[1:] + expected_reads, strict=True
    ):
        assert ours is not None and torch.equal(ours, theirs)
    only_last = [*nothing[1:], True]
    streams, reads = replay_forward(entry, outputs, mappings, nothing, only_last)
    assert streams == nothing_at_all(layers) and reads[:-1] == nothing_at_all(layers - 1)
    assert reads[-1] is not None and torch.equal(reads[-1], expected_reads[-1])
    assert replay_forward(entry, outputs, mappings, nothing, nothing) == (
        nothing_at_all(layers),
        nothing_at_all(layers),
    )


def nothing_at_all(layers: int) -> list[None]:
    return [None] * layers


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_round_as_the_operators_do(
    kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", kernels)
    entry = expand_streams(randn(2, 3, 16, dtype=dtype), 4)
    outputs = [randn(2, 3, 16, dtype=dtype) for _ in range(2)]
    mappings = [
        StreamMappings(m.pre.view(2, 3, 4), m.post.view(2, 3, 4), m.residual.view(2, 3, 4, 4))
        for m in stretch(6, 4, 3)
    ]
    streams, reads = replay_streams(entry, outputs, mappings, [False, True, True], [True] * 3)
    current = entry
    for k, record in enumerate(mappings):
        if k > 0:
            before = mappings[k - 1]
            current = merge_streams(current, outputs[k - 1], before.residual, before.post)
            merged = streams[k]
            assert merged is not None and torch.equal(merged, current)
        read = reads[k]
        assert read is not None and torch.equal(read, aggregate_streams(current, record.pre))
    with pytest.raises(ValueError, match="output must be"):
        replay_streams(entry, [outputs[0][..., :8]], mappings[:2], [False, True], [True] * 2)


def test_the_reference_agrees() -> None:
    mappings, entry = stretch(5, 3, 4), randn(5, 3, 20)
    outputs = [randn(5, 20) for _ in range(3)]
    want = [False, True, False, True], [True, False, False, True]
    ours = replay_forward(entry, outputs, mappings, *want)
    theirs = reference.replay_forward(entry, outputs, mappings, *want)
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
