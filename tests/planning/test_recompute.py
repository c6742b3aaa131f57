import pytest

from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.recompute import recompute_block, saved_with_recompute


@pytest.mark.parametrize(
    ("num_sub_layers", "num_streams", "block"),
    [(24, 4, 4), (36, 4, 4), (60, 4, 6), (122, 4, 9), (1, 4, 1), (2, 1, 1)],
)
def test_block_size_is_the_smallest_minimum_of_equation_20(num_sub_layers, num_streams, block):
    assert recompute_block(num_sub_layers, num_streams) == block


def test_every_block_size_is_a_minimum():
    for layers in range(1, 80):
        for n in (1, 2, 4, 8):
            costs = {size: n * -(-layers // size) + (n + 2) * size for size in range(1, layers + 1)}
            best = min(costs.values())
            assert recompute_block(layers, n) == min(s for s, c in costs.items() if c == best)


def test_recompute_keeps_what_table_3_says(build):
    """Per sub-layer (n + 3)·C becomes C, plus n·C per block and (n + 2)·C within one."""
    n, width, layers, block, tokens = 4, 32, 12, 3, 64
    model = build("mhc", num_layers=layers // 2)
    batch = MicroBatch(1, tokens, precision_of("bf16-true"), fused_norm=True)
    before = sum(saved_for_backward(model, batch, copies_weights=False).values())
    after = saved_with_recompute(model, batch, copies_weights=False, block=block)
    vector, statistic = 2 * width * tokens, 4 * tokens
    # The first sub-layer's streams are one embedding.
    dropped = (layers * (n + 2) - (n - 1)) * vector + layers * statistic
    again = (layers // block * n + block * (n + 2)) * vector + block * statistic
    assert after == before - dropped + again


def test_a_residual_network_has_to_keep_outputs_it_did_not_keep(build):
    model = build("residual", num_layers=6)
    batch = MicroBatch(1, 64, precision_of("bf16-true"), fused_norm=True)
    before = sum(saved_for_backward(model, batch, copies_weights=False).values())
    vector, statistic = 2 * 32 * 64, 4 * 64
    dropped = 12 * (2 * vector + statistic)
    again = 12 * vector + 4 * vector + 3 * (2 * vector + statistic)
    after = saved_with_recompute(model, batch, copies_weights=False, block=3)
    assert after == before - dropped + again
