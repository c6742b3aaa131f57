"""Recompute blocks: their size, and the bytes that are kept and rebuilt."""

from dataclasses import replace
from functools import partial

from mhc_lightning.modules import Engram
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.recompute import best_block, rebuilt_bytes
from mhc_lightning.planning.sub_layers import places_in_blocks


def test_recompute_keeps_what_table_3_says(build):
    """Per sub-layer (n + 3)·C becomes C, plus n·C per block, and (n + 2)·C within one at most."""
    n, width, layers, block, tokens = 4, 32, 12, 3, 64
    model = build("mhc", num_layers=layers // 2)
    batch = MicroBatch(1, tokens, precision_of("bf16-true"), fused_norm=True)
    blocks = replace(batch, recompute_block=block)
    before = sum(saved_for_backward(model, batch, copies_weights=False).values())
    after = sum(saved_for_backward(model, blocks, copies_weights=False).values())
    vector = 2 * width * tokens
    # The first sub-layer's streams are one embedding; norms keep their one number per token.
    assert before - after == (layers * (n + 2) - layers // block * n) * vector
    # One norm's output at a time.
    assert rebuilt_bytes(model, blocks) == ((block - 1) * n + block + 1) * vector
    assert rebuilt_bytes(model, batch) == 0


def test_a_residual_network_has_nothing_to_win(build):
    model = build("residual", num_layers=6)
    assert best_block(model) == model.set_recompute("auto") == model.set_recompute(3) == 0
    batch = MicroBatch(1, 64, precision_of("bf16-true"), fused_norm=True)
    blocks = replace(batch, recompute_block=3)
    assert saved_for_backward(model, batch, False) == saved_for_backward(model, blocks, False)
    assert rebuilt_bytes(model, blocks) == 0


def test_a_block_ends_at_what_cannot_be_replayed(build):
    model = build("mhc", num_layers=4)
    assert places_in_blocks(model, 3) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert places_in_blocks(model, 0) == 8 * [None]
    model.blocks[1].feed_forward_connection = build("residual").blocks[0].feed_forward_connection
    assert places_in_blocks(model, 3) == [0, 1, 2, None, 0, 1, 2, 0]
    assert best_block(model) == 2


def test_a_block_begins_behind_a_memory(build):
    memory = partial(Engram, rows=100, layers=[1, 2], num_heads=2, dim=8)
    model = build("mhc", num_layers=4, memory=memory)
    assert places_in_blocks(model, 3) == [0, 1, 0, 1, 0, 1, 2, 0]
    assert places_in_blocks(model, 0) == 8 * [None]
