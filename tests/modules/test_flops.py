"""The operations of training, against those of the parts they are made of."""

from functools import partial

import pytest
from networks import tiny_transformer

from mhc_lightning.modules import Engram, OverEncoding


@pytest.mark.parametrize("conv", [True, False])
def test_engram_adds_its_projections_and_convolution_but_no_rows(conv: bool) -> None:
    plain = tiny_transformer().flops_per_token(64)
    added = set()
    for rows in (100, 10_000):
        memory = partial(Engram, rows=rows, layers=[1], num_heads=2, dim=8, conv=conv)
        added.add(tiny_transformer(memory=memory).flops_per_token(64) - plain)
    # Keys of four streams and a value of width 16, of 16 read values; four taps for each channel.
    assert added == {6 * (5 * 16 * 16 + conv * 4 * 16 * 4)}


def test_over_encoding_adds_its_projection() -> None:
    memory = partial(OverEncoding, rows=101, num_heads=2, dim=8)
    added = tiny_transformer(memory=memory).flops_per_token(
        64
    ) - tiny_transformer().flops_per_token(64)
    assert added == 6 * 16 * 16


def test_over_decoding_adds_its_projection_and_a_second_pass_of_the_head() -> None:
    memory = partial(OverEncoding, rows=101, num_heads=2, dim=8)
    more = partial(memory, over_decoding_weight=0.1)
    networks = [tiny_transformer(memory=each) for each in (memory, more)]
    plain, decoding = (network.flops_per_token(64) for network in networks)
    assert decoding - plain == 6 * (16 * 16 + 40 * 16)
