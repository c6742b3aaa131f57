"""Parameter counts, against those of real modules."""

from functools import partial

import pytest

from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.planning.parameters import count_parameters


def test_active_parameters_leave_out_the_embedding_and_idle_experts(build):
    sizes = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
    model = build("hc", **sizes)
    counts = count_parameters(model)
    vocabulary = 100 * 32
    one_expert = 3 * 32 * 40
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.active == counts.total - vocabulary - 6 * one_expert
    assert counts.vocabulary == 2 * vocabulary
    # Per sub-layer: C(n + 2) + n² + 2n + 2.
    assert counts.connections == 4 * (32 * 6 + 24 + 2)


def test_a_residual_network_has_no_connection_parameters(build):
    counts = count_parameters(build("residual"))
    assert counts.connections == 0
    assert counts.active == counts.total - 100 * 32
    assert counts.memory == 0


def test_the_rows_that_n_grams_name_are_counted_and_no_padding(build):
    plain = count_parameters(build("mhc", num_layers=3))
    memory = partial(Engram, rows=500, layers=[0, 2], num_heads=2, dim=8, conv_kernel=4)
    model = build("mhc", num_layers=3, memory=memory)
    counts = count_parameters(model)
    # Two heads of two orders in two blocks; the primes from 500 on.
    primes = (503, 509, 521, 523, 541, 547, 557, 563)
    assert counts.memory == 4 * sum(primes)
    # Keys of four streams and a value, of 16 read values; per stream two norms, and a convolution
    # of four taps with its norm.
    projections = 5 * 32 * 16 + 4 * 32 * (2 + 4 + 1)
    assert counts.total == plain.total + counts.memory + 2 * projections
    assert counts.active == plain.active + 2 * (projections + 16)
    assert counts.total < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("word_scale", ["mean", "full"])
def test_over_encodings_rows_are_memory_too(word_scale, build):
    plain = count_parameters(build("hc"))
    memory = partial(OverEncoding, rows=301, num_heads=1, dim=6, word_scale=word_scale)
    counts = count_parameters(build("hc", memory=memory))
    assert counts.memory == 6 * (301 + 303)
    assert counts.total == plain.total + counts.memory + 32 * 12
    assert counts.active == plain.active + 32 * 12 + 12
    assert counts.vocabulary == plain.vocabulary
