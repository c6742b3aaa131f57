"""The bytes that a forward pass keeps, against those that autograd is given to keep."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.planning import activations
from mhc_lightning.planning.activations import KINDS, MicroBatch, saved_for_backward
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.precision import precision_of

MOE = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
FEW_SHARED = {"num_experts": 6, "num_active_experts": 3, "num_shared_experts": 0}
WIDE = {"dim": 96, "num_heads": 4, "head_dim": 32, "rope_dim": 16, "kv_rank": 64, "ffn_dim": 200}

# Connection, precision, sequences, length, sizes. Every second case recomputes: each kind of
# connection has both, and so has each precision.
CASES = [
    ("residual", "32-true", 2, 64, {}),
    ("residual", "bf16-mixed", 3, 48, MOE),
    ("residual", "bf16-true", 1, 128, WIDE),
    ("hc", "32-true", 2, 64, {"num_streams": 2}),
    ("hc", "bf16-mixed", 2, 32, {**WIDE, **MOE}),
    ("hc", "bf16-true", 2, 64, {"num_streams": 1}),
    ("hc_linear", "32-true", 2, 64, MOE),
    ("hc_static", "bf16-mixed", 2, 64, {}),
    ("mhc", "32-true", 1, 200, {"num_layers": 5, "num_streams": 3}),
    ("mhc", "32-true", 2, 64, {**FEW_SHARED, "rope_dim": 0}),
    ("mhc", "bf16-mixed", 2, 64, {**WIDE, "num_layers": 3, "num_streams": 8}),
    ("mhc", "bf16-mixed", 4, 32, {**MOE, "num_dense_layers": 0, "vocab_size": 3000}),
    ("mhc", "bf16-true", 2, 96, MOE),
    ("mhc", "bf16-true", 1, 64, {"num_streams": 1, "num_layers": 1}),
    ("mhc_single_pass", "32-true", 2, 64, {}),
    ("mhc_single_pass", "bf16-mixed", 2, 64, {**MOE, "num_layers": 3}),
    ("mhc_single_pass", "bf16-true", 3, 33, {"num_streams": 3}),
    ("mhc_lite", "32-true", 2, 64, {}),
    ("mhc_lite", "bf16-mixed", 2, 64, {"num_streams": 3, **MOE}),
    ("krom", "32-true", 2, 64, {"num_streams": 6}),
    ("krom", "bf16-true", 2, 64, {}),
    ("identity", "32-true", 2, 64, {}),
    ("identity", "bf16-mixed", 2, 64, {"num_streams": 8}),
]


ENGRAM = partial(Engram, rows=200, num_heads=2, dim=8)
BARE = partial(Engram, rows=200, num_heads=1, orders=[2, 3, 4], conv=False, bias=True)
OVER_ENCODING = partial(OverEncoding, rows=301, num_heads=2, dim=16)
# The same, with a memory. In front of a recompute block, within one, at the first block, in all.
WITH_MEMORY = [
    ("mhc", "32-true", 2, 64, {"memory": ENGRAM, "num_layers": 4}, 0),
    ("mhc", "32-true", 2, 64, {"memory": ENGRAM, "num_layers": 5}, 3),
    ("mhc", "bf16-mixed", 2, 48, {"memory": partial(BARE, layers=[0, 1, 2]), "num_layers": 3}, 2),
    ("mhc", "bf16-true", 2, 48, {"memory": partial(ENGRAM, layers=[0]), **MOE}, 3),
    ("mhc_single_pass", "bf16-mixed", 2, 64, {"memory": ENGRAM, "num_layers": 4}, 0),
    ("mhc_single_pass", "32-true", 2, 64, {"memory": ENGRAM, "num_layers": 4}, 3),
    ("hc", "bf16-mixed", 2, 64, {"memory": BARE, "num_layers": 4, "num_streams": 2}, 0),
    ("residual", "bf16-mixed", 3, 48, {"memory": ENGRAM, "num_layers": 4}, 3),
    ("residual", "bf16-true", 3, 48, {"memory": OVER_ENCODING}, 0),
    ("mhc", "32-true", 2, 64, {"memory": OVER_ENCODING}, 3),
    ("mhc", "bf16-mixed", 2, 64, {"memory": partial(OVER_ENCODING, word_scale="full")}, 0),
    ("mhc", "bf16-mixed", 2, 64, {"memory": partial(OVER_ENCODING, over_decoding_weight=0.1)}, 0),
    ("mhc", "32-true", 2, 64, {"memory": partial(OVER_ENCODING, over_decoding_weight=0.1)}, 0),
]


def kept_storages(model, forward):
    """Bytes of the storages that a pass makes autograd keep: not the model's, nor constants."""
    own = [*model.parameters(), *model.buffers()]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in own}
    passes = []
    for _ in range(2):
        kept: dict[
            int, int
        ] = {}  # by address: what is kept stays alive, so that no address is used twice

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward()
        assert loss.requires_grad
        passes.append((kept, loss))
    (first, _), (second, _) = passes
    return sum(size for at, size in second.items() if at not in ignored | first.keys())


@pytest.mark.parametrize(
    ("connection", "precision", "sequences", "length", "sizes", "block"),
    [*((*case, 3 * (number % 2)) for number, case in enumerate(CASES)), *WITH_MEMORY],
)
def test_the_bytes_kept_for_backward_are_those_predicted(
    connection, precision, sequences, length, sizes, block, build, loss
):
    model = build(connection, precision, **sizes)
    sizes = precision_of(precision)
    batch = MicroBatch(sequences, length, sizes, False, model.set_recompute(block or "off"))
    predicted = saved_for_backward(model, batch, copies_weights=sizes.is_mixed)
    kept = kept_storages(model, lambda: loss(model, sequences, length, precision))
    assert sum(predicted.values()) == kept
    assert set(predicted) == set(KINDS)


def test_activations_grow_with_the_batch_and_weight_copies_do_not(build):
    model = build("mhc", **MOE)
    precision = precision_of("bf16-mixed")
    one = saved_for_backward(model, MicroBatch(1, 64, precision, True), copies_weights=True)
    two = saved_for_backward(model, MicroBatch(2, 64, precision, True), copies_weights=True)
    for kind in ("tokens", "connections", "norms", "feed_forward"):
        assert two[kind] == 2 * one[kind] > 0
    assert two["weight_copies"] == one["weight_copies"] > 0
    none = saved_for_backward(model, MicroBatch(1, 64, precision, True), copies_weights=False)
    assert none["weight_copies"] == 0


def test_a_fused_norm_keeps_input_and_one_number_per_token(build):
    model = build("residual", num_layers=1)
    batch = MicroBatch(1, 10, precision_of("bf16-true"), fused_norm=True)
    norms = saved_for_backward(model, batch, copies_weights=False)["norms"]
    width, latent, rope = 32, 24, 8
    assert norms == 10 * ((2 * width + 4) + (2 * (latent + rope) + 4) + 2 * (2 * width + 4))


class Cubic(nn.Module):
    """A body that planning has never heard of."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return (x * self.weight) ** 3


class ByValue(nn.Module):
    """A body whose shapes depend on values."""

    def forward(self, x):
        return x * x[x > 0].sum()


def test_a_body_of_ones_own_is_counted(build, loss):
    model = build("mhc", num_layers=3)
    model.blocks[1].feed_forward.body = Cubic(32)
    batch = MicroBatch(2, 16, precision_of("32-true"), fused_norm=False)
    predicted = saved_for_backward(model, batch, copies_weights=False)
    assert sum(predicted.values()) == kept_storages(model, lambda: loss(model, 2, 16, "32-true"))


def test_a_body_that_does_not_run_without_values_is_named(build):
    model = build("mhc")
    model.blocks[1].feed_forward.body = ByValue()
    batch = MicroBatch(2, 16, precision_of("32-true"), fused_norm=False)
    with pytest.raises(NotPlannableError, match="ByValue"):
        saved_for_backward(model, batch, copies_weights=False)


@pytest.mark.parametrize("connection", ["mhc", "mhc_single_pass", "mhc_lite", "krom"])
def test_counting_leaves_the_model_as_it_was(connection, build, loss):
    model = build(connection, **MOE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = MicroBatch(2, 16, precision_of("bf16-mixed"), fused_norm=True)
    saved_for_backward(model, batch, copies_weights=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not model.blocks[1].feed_forward.body.balance.load.any()
    assert loss(model, 2, 16, "32-true").isfinite()


@pytest.mark.parametrize("size", [0, 4])
def test_sub_layers_that_are_alike_are_run_once(build, monkeypatch, size):
    model = build("mhc", num_layers=12, **MOE)
    runs: list[str] = []
    real = activations.kept_by
    monkeypatch.setattr(activations, "_known", {})
    monkeypatch.setattr(
        activations, "kept_by", lambda *given: runs.append(given[3]) or real(*given)
    )
    batch = MicroBatch(2, 16, precision_of("bf16-true"), True, recompute_block=size)
    saved_for_backward(model, batch, copies_weights=False)
    # Embedding, head twice; the first sub-layer reads copies, and the first feed-forward is dense.
    assert len(runs) == 3 + (2 if size else 4)
    saved_for_backward(model, batch, copies_weights=False)
    assert len(runs) == 3 + (2 if size else 4)
    saved_for_backward(model, replace(batch, recompute_block=size + 2), copies_weights=False)
    assert runs.count("tokens") == 1 and runs.count("loss") == 2  # nothing is recomputed there


def test_frozen_weights_are_not_taken_for_trained_ones(build, loss):
    model = build("mhc", num_layers=3)
    batch = MicroBatch(2, 16, precision_of("32-true"), fused_norm=False)
    trained = sum(saved_for_backward(model, batch, copies_weights=False).values())
    for block in model.blocks[1:]:
        block.feed_forward.requires_grad_(False)
    frozen = sum(saved_for_backward(model, batch, copies_weights=False).values())
    assert frozen == kept_storages(model, lambda: loss(model, 2, 16, "32-true")) < trained
