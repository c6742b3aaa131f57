"""The bytes that one device holds, against the fullest moment of real training steps."""

import pytest
import torch
from torch import nn

from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.memory import device_memory
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.strategies import shard

MOE = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
SIZES = {
    "dim": 128,
    "num_layers": 3,
    "num_heads": 4,
    "head_dim": 32,
    "rope_dim": 16,
    "kv_rank": 64,
    "ffn_dim": 64,
    "vocab_size": 257,
}


def adam(model, parameter):
    return 2


# Connection, precision, sequences, micro-batches, sizes: every precision, with and without experts,
# one micro-batch and several. What each connection keeps is counted exactly in test_activations.
CASES = [
    ("residual", "bf16-mixed", 4, 1, {}),
    ("hc", "bf16-mixed", 2, 2, MOE),
    ("mhc", "32-true", 4, 2, {"num_streams": 2}),
    ("mhc", "bf16-mixed", 1, 2, {**MOE, "vocab_size": 20000}),
    ("mhc", "bf16-true", 2, 1, MOE),
    ("mhc_single_pass", "32-true", 2, 1, {}),
]
# The same, and sub-layers per recompute block.
RECOMPUTED = [
    ("hc", "bf16-mixed", 2, 2, MOE, 3),
    ("mhc", "32-true", 4, 2, {"num_streams": 2}, 6),
    ("mhc", "bf16-true", 2, 1, {"num_layers": 6}, "auto"),
]
# Large enough for a GPU's workspaces not to matter.
LARGE = {**SIZES, "dim": 1024, "num_heads": 8, "head_dim": 128, "rope_dim": 64, "kv_rank": 256}
DEVICES = {"cpu": (SIZES, 256)}
if torch.cuda.is_available():
    DEVICES["cuda"] = (LARGE, 4096)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("connection", "precision", "sequences", "micro_batches", "sizes"), CASES)
def test_the_fullest_moment_of_training_is_predicted(
    device, connection, precision, sequences, micro_batches, sizes, build, training, peak
):
    base, length = DEVICES[device]
    model = build(connection, precision, **{**base, **sizes}).to(device)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    batch = MicroBatch(sequences, length, precision_of(precision), device == "cuda")
    memory = device_memory(model, batch, DataParallel(), adam)
    assert memory.weights == weights
    two_steps = training(model, batch, precision, micro_batches)
    assert memory.total == pytest.approx(weights + peak(device, two_steps), rel=0.1)


@pytest.mark.parametrize(
    ("connection", "precision", "sequences", "micro_batches", "sizes", "recompute"), RECOMPUTED
)
def test_the_fullest_moment_with_recompute_is_predicted(
    connection, precision, sequences, micro_batches, sizes, recompute, build, training, peak
):
    model = build(connection, precision, **{**SIZES, **sizes})
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    block = model.set_recompute(recompute)
    batch = MicroBatch(sequences, 256, precision_of(precision), False, block)
    memory = device_memory(model, batch, DataParallel(), adam)
    two_steps = training(model, batch, precision, micro_batches)
    assert memory.total == pytest.approx(weights + peak("cpu", two_steps), rel=0.1)


@pytest.mark.parametrize(
    ("connection", "precision", "sequences", "micro_batches", "sizes"),
    [
        ("hc", "bf16-mixed", 2, 2, MOE),
        ("mhc", "32-true", 4, 1, {"num_streams": 2}),
    ],
)
def test_the_fullest_moment_of_sharded_training_is_predicted(
    connection, precision, sequences, micro_batches, sizes, build, training, peak, mesh
):
    model = build(connection, precision, **{**SIZES, "num_layers": 6, **sizes})
    batch = MicroBatch(sequences, 256, precision_of(precision), fused_norm=False)
    memory = device_memory(model, batch, DataParallel(1, sharded=True), adam)
    gathered_in = torch.bfloat16 if precision == "bf16-mixed" else None
    shard(model, mesh, torch.device("cpu"), gathered_in)
    two_steps = training(model, batch, precision, micro_batches)
    assert memory.total == pytest.approx(memory.weights + peak("cpu", two_steps), rel=0.1)


def test_gathering_in_bfloat16_saves_the_copies_of_autocast(build, training, peak, mesh):
    """And half of what stays gathered: embedding and head."""
    model = build("mhc", **SIZES)
    batch = MicroBatch(1, 32, precision_of("bf16-mixed"), fused_norm=False)
    copies = saved_for_backward(model, batch, copies_weights=True)["weight_copies"]
    at_the_ends = 2 * model.vocab_size * SIZES["dim"]
    peaks = {}
    for gathered_in in (None, torch.bfloat16):
        model = build("mhc", **SIZES)
        seen: set[torch.dtype] = set()
        shard(model, mesh, torch.device("cpu"), gathered_in)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda linear, _, seen=seen: seen.add(linear.weight.dtype)
                )
        peaks[gathered_in] = peak("cpu", training(model, batch, "bf16-mixed", 2))
        assert seen == {gathered_in or torch.float32}
    assert peaks[None] - peaks[torch.bfloat16] >= copies + 2 * at_the_ends


def test_sharding_divides_what_training_keeps_and_adds_what_is_gathered(build):
    model = build("mhc", **MOE)
    batch = MicroBatch(1, 64, precision_of("bf16-mixed"), fused_norm=True)
    alone = device_memory(model, batch, DataParallel(), adam)
    shared = device_memory(model, batch, DataParallel(4, sharded=True), adam)
    assert shared.optimizer == pytest.approx(alone.optimizer / 4, rel=1e-3)
    assert shared.gradients == pytest.approx(alone.gradients / 4, rel=1e-3)
    assert shared.weights == pytest.approx(alone.weights / 4, rel=1e-2)
    # Gathered in bfloat16: autocast has nothing to copy.
    copies = saved_for_backward(model, batch, copies_weights=True)["weight_copies"]
    assert shared.activations == alone.activations - copies
    assert alone.communication == 0
    vocabulary = 2 * model.output.weight.numel()
    assert shared.communication > 2 * vocabulary
    assert sum(vars(shared).values()) == shared.total


def test_replicas_need_as_much_as_one_device_and_perhaps_buckets(build):
    model = build("hc")
    batch = MicroBatch(1, 64, precision_of("32-true"), fused_norm=True)
    alone = device_memory(model, batch, DataParallel(), adam)
    replica = device_memory(model, batch, DataParallel(2), adam)
    with_buckets = device_memory(model, batch, DataParallel(2, copies_gradients=True), adam)
    assert replica == alone
    assert with_buckets.total == alone.total + alone.gradients


def test_low_precision_leaves_connections_in_float32(build):
    model = build("mhc")
    connections = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.split(".")[2:3] and name.split(".")[2].endswith("_connection")
    )
    others = sum(p.numel() for p in model.parameters()) - connections
    batch = MicroBatch(1, 8, precision_of("bf16-true"), fused_norm=True)
    memory = device_memory(model, batch, DataParallel(), adam)
    assert connections > 0
    assert memory.gradients == 4 * connections + 2 * others
    assert memory.optimizer == 2 * memory.gradients
