"""Bytes that stream operations move, against the counts of the paper."""

from functools import partial

import pytest

from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.traffic import stream_traffic

C, LAYERS = 32, 4


def test_forward_traffic_is_table_2(build):
    # n = 4: reads 21C + 24 and writes 13C + 24 elements, coefficients in float32.
    traffic = stream_traffic(build("mhc"), precision_of("bf16-mixed"))
    assert traffic.forward_unfused == LAYERS * (2 * (21 + 13) * C + 4 * (24 + 24))


@pytest.mark.parametrize(("n", "forward", "training"), [(4, 18, 49), (2, 10, 27)])
def test_fused_traffic(n, forward, training, build):
    traffic = stream_traffic(build("mhc", num_streams=n), precision_of("bf16-true"))
    assert traffic.forward_fused == LAYERS * 2 * forward * C
    assert traffic.training_fused == LAYERS * 2 * training * C


def test_a_residual_reads_two_vectors_and_writes_one(build):
    traffic = stream_traffic(build("residual"), precision_of("32-true"))
    assert traffic == (LAYERS * 4 * 3 * C, LAYERS * 4 * 3 * C, LAYERS * 4 * 6 * C)


def test_each_memory_reads_and_changes_the_streams_once_more(build):
    precision = precision_of("bf16-true")
    plain = stream_traffic(build("mhc"), precision)
    memory = partial(Engram, rows=100, layers=[0, 1], num_heads=2, dim=8)
    found = stream_traffic(build("mhc", memory=memory), precision)
    vector = 2 * 2 * C  # bytes of one stream, in two blocks
    added = [ours - theirs for ours, theirs in zip(found, plain, strict=True)]
    # n = 4. Two kernels forward move 2n and 2n + 1 vectors, two backward n + 2 and 5n.
    assert added == [25 * vector, 17 * vector, 43 * vector]
    only_input = partial(OverEncoding, rows=101)
    assert stream_traffic(build("mhc", memory=only_input), precision) == plain
