import pytest
import torch
from torch import nn

from mhc_lightning.planning.activations import KINDS, MicroBatch, body_bytes, saved_for_backward
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.precision import precision_of

MOE = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
FEW_SHARED = {"num_experts": 6, "num_active_experts": 3, "num_shared_experts": 0}
WIDE = {"dim": 96, "num_heads": 4, "head_dim": 32, "rope_dim": 16, "kv_rank": 64, "ffn_dim": 200}

# Connection, precision, sequences, length, sizes.
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
    ("lite", "32-true", 2, 64, {}),
    ("lite", "bf16-mixed", 2, 64, {"num_streams": 3, **MOE}),
    ("krom", "32-true", 2, 64, {"num_streams": 6}),
    ("krom", "bf16-true", 2, 64, {}),
    ("identity", "32-true", 2, 64, {}),
    ("identity", "bf16-mixed", 2, 64, {"num_streams": 8}),
]


def kept_storages(model, forward):
    """Bytes of the storages that autograd keeps, other than those of the model itself."""
    own = [*model.parameters(), *model.buffers()]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}  # by address: what is kept stays alive, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize(("connection", "precision", "sequences", "length", "sizes"), CASES)
def test_the_bytes_kept_for_backward_are_those_predicted(
    connection, precision, sequences, length, sizes, block, build, loss
):
    model = build(connection, precision, **sizes)
    sizes = precision_of(precision)
    batch = MicroBatch(sequences, length, sizes, False, model.set_recompute(block or "off"))
    predicted = saved_for_backward(model, batch, copies_weights=sizes.is_mixed)
    kept = kept_storages(model, lambda: loss(model, sequences, length, precision))
    # 10% is what is promised; as the prediction is read off the code, it can do better.
    assert sum(predicted.values()) == pytest.approx(kept, rel=0.01)
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


def test_a_fused_norm_keeps_input_output_and_one_number_per_token(build):
    model = build("residual", num_layers=1)
    batch = MicroBatch(1, 10, precision_of("bf16-true"), fused_norm=True)
    norms = saved_for_backward(model, batch, copies_weights=False)["norms"]
    width, latent, rope = 32, 24, 8
    per_token = 2 * (4 * width + 4) + (2 * (latent + rope) + 2 * latent + 4) + (2 * width + 4)
    assert norms == 10 * per_token


def test_a_body_that_is_not_known_is_named():
    with pytest.raises(NotPlannableError, match="Identity"):
        body_bytes(nn.Identity(), MicroBatch(1, 1, precision_of("32-true"), False))
