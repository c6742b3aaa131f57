"""What a pipeline's devices hold, against real stages on the CPU."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)
from torch.distributed.pipelining.stage import _PipelineStageBase

from mhc_lightning.modules import Engram, OverEncoding
from mhc_lightning.planning.activations import KINDS, MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.pipeline_memory import boundary_bytes, pipeline_memory
from mhc_lightning.planning.precision import precision_of
from mhc_lightning.planning.schedule_order import PassKind, schedule_order
from mhc_lightning.planning.split_backward import gradients_for_weights
from mhc_lightning.planning.stage_part import part_of
from mhc_lightning.planning.stages import cut_network
from mhc_lightning.strategies.pipeline_stage import Stage
from mhc_lightning.strategies.sharding import shard_parts

MOE = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}
SIZES = {
    "dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 32,
    "rope_dim": 16,
    "kv_rank": 64,
    "ffn_dim": 64,
    "vocab_size": 257,
}


ENGRAM = partial(Engram, rows=1000, layers=[1, 3], num_heads=4, dim=32)


def adam(model, parameter):
    return 2


class Device:
    """One device of a pipeline, alone: does to its stages what torch's engine does."""

    def __init__(self, model, plan, device, batch, precision, parts, mesh=None):
        count = len(plan.blocks)
        self.plan, self.device, self.precision = plan, device, precision
        self.stages = {k: Stage(model, plan.blocks[k], k, count) for k in plan.stages_of(device)}
        self.mesh, mixed = mesh, precision == "bf16-mixed"
        self.recalls = model.memory.hash is not None
        for stage in self.stages.values():
            if mixed:
                shares = not plan.kind.splits_backward
                stage.autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=shares)
            if mesh is not None:
                low = torch.bfloat16 if mixed else None
                blocks = stage.blocks.values()
                shard_parts(stage, blocks, mesh, low, reshard_after_forward=False)
                stage.set_is_last_backward(False)
                stage.set_reshard_after_backward(False)
                stage.set_requires_gradient_sync(False)
        tokens = torch.randint(0, model.vocab_size, (parts, batch.sequences, batch.length + 1))
        self.inputs, self.targets = tokens[..., :-1], tokens[..., 1:]
        shape = batch.sequences, batch.length, model.num_streams, model.embedding.embedding_dim
        streams = torch.empty(shape, dtype=batch.precision.activation_dtype, device="meta")
        carry = model.carry_like(streams)
        self.flow = [streams] if carry is None else [streams, carry]
        self.received = {
            (forward, k): [self.buffers(forward) for _ in range(parts)]
            for k in self.stages
            for forward in (True, False)
            if k != (0 if forward else count - 1)
        }
        self.forwards, self.halves = {}, {}

    def buffers(self, wants):
        return tuple(torch.zeros_like(t, device="cpu", requires_grad=wants) for t in self.flow)

    def forward(self, k, part):
        stage = self.stages[k]
        flow: Any = (self.inputs[part],) if k == 0 else self.received[True, k][part]
        targets = {"targets": self.targets[part]} if stage.is_last else {}
        tokens = {"tokens": self.inputs[part]} if self.recalls else {}
        out = stage(*flow, **targets, **tokens)
        out = out if isinstance(out, tuple) else (out.sum(),)
        self.forwards[k, part] = out, list(flow)
        if k + 1 in self.stages:  # the next stage's inputs are these tensors
            inputs = tuple(tensor.detach().requires_grad_(True) for tensor in out)
            self.received[True, k + 1][part] = inputs
        return out

    def backward(self, kind, k, part):
        parameters = self.stages[k].parameters()
        if kind is PassKind.BACKWARD_WEIGHT and k > 0:
            stage_backward_weight(parameters, self.halves.pop((k, part)))
            return
        halved = kind is PassKind.BACKWARD_WEIGHT
        out, flow = (self.halves if halved else self.forwards).pop((k, part))
        grads: Any = None if self.stages[k].is_last else self.received[False, k][part]
        if kind is not PassKind.BACKWARD_INPUT:
            back = stage_backward(out[0] if grads is None else out, grads, flow)
        elif k == 0:  # all of it is done in the second half
            self.halves[k, part] = out, flow
            return
        else:
            back, self.halves[k, part] = stage_backward_input(list(out), grads, flow, parameters)
        if k - 1 in self.stages:
            self.received[False, k - 1][part] = tuple(back)

    def step(self, slots):
        with torch.autocast("cpu", enabled=False):  # as the engine's, it keeps the copies
            self.work(slots)

    def work(self, slots):
        for kind, k, part in (action for slot in slots for action in slot):
            if kind is PassKind.FORWARD:
                self.forward(k, part)
            else:
                self.backward(kind, k, part)
        for stage in self.stages.values():
            if self.mesh is not None:
                base: Any = SimpleNamespace(submod=stage)
                _PipelineStageBase.perform_reduce_grad(base, 1)
                for off in ("set_is_last_backward", "set_reshard_after_backward"):
                    getattr(stage, off)(False)
                stage.set_requires_gradient_sync(False)
        for kept in self.received.values():
            for buffer in (tensor for buffers in kept for tensor in buffers):
                buffer.grad = None


def predicted(model, plan, parts, batch, replicas=DataParallel()):  # noqa: B008
    return pipeline_memory(model, plan, parts, batch, replicas, adam)


def two_steps(device, order):
    """The work of two optimizer steps, with all that is allocated for it but the weights."""

    def work():
        one = device()
        parameters = [p for stage in one.stages.values() for p in stage.parameters()]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for _ in range(2):
            one.step(order[one.device])
            optimizer.step()
            for p in parameters:
                p.grad.zero_()

    return work


CASES = [
    ("residual", "32-true", {}, 0),
    ("residual", "bf16-true", MOE, 0),
    ("hc", "bf16-mixed", MOE, 3),
    ("mhc", "32-true", {"num_streams": 2}, 0),
    ("mhc", "bf16-mixed", {}, 0),
    ("mhc", "bf16-true", MOE, 2),
    ("mhc_single_pass", "32-true", {}, 0),
    ("mhc_single_pass", "bf16-mixed", MOE, 3),
    ("mhc", "bf16-mixed", {"memory": ENGRAM}, 0),
    ("mhc_single_pass", "32-true", {"memory": partial(ENGRAM, layers=[0, 2])}, 2),
    ("mhc", "bf16-true", {"memory": partial(OverEncoding, rows=999)}, 2),
]


@pytest.mark.parametrize(("connection", "precision", "sizes", "block"), CASES)
def test_the_bytes_that_a_stage_keeps_are_those_predicted(
    connection, precision, sizes, block, build
):
    model = build(connection, precision, **{**SIZES, **sizes})
    model.set_recompute(block or "off")
    for schedule in ("gpipe", "zbv"):
        plan = cut_network(model, schedule=schedule, devices=2)
        batch = MicroBatch(2, 64, precision_of(precision), False, model.recompute_block_size)
        for found in predicted(model, plan, 1, batch):
            device = Device(model, plan, found.device, batch, precision, 1)
            own = [*model.parameters(), *model.buffers(), device.inputs]
            buffers = [t for kept in device.received.values() for each in kept for t in each]
            ignored = {t.untyped_storage().data_ptr() for t in [*own, *buffers]}
            kept: dict[int, int] = {}

            def keep(tensor, kept=kept, ignored=ignored):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in ignored:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                for k in device.stages:
                    outs = device.forward(k, 0)
                    if k + 1 in device.stages:
                        ignored |= {out.untyped_storage().data_ptr() for out in outs}
                    elif k + 1 < len(plan.blocks):
                        for out in outs:
                            keep(out)
            wanted = sum(found.activations[kind] for kind in KINDS if kind != "tokens")
            assert sum(kept.values()) == wanted, (schedule, found.device)


def test_micro_batches_share_copies_of_weights_unless_backward_is_split(build):
    model = build("mhc", "bf16-mixed", **SIZES)
    batch = MicroBatch(2, 64, precision_of("bf16-mixed"), False)

    def copies(schedule, parts):
        plan = cut_network(model, schedule=schedule, devices=2)
        return [d.activations["weight_copies"] for d in predicted(model, plan, parts, batch)]

    assert copies("gpipe", 4) == copies("gpipe", 1) != [0, 0]
    assert copies("zbv", 4) > copies("zbv", 1)


# Every schedule; every precision, connection and recompute block with some of them.
RUNS = [
    ("1f1b", 2, 4, "mhc_single_pass", "32-true", {}, 0),
    ("gpipe", 2, 4, "hc", "bf16-mixed", MOE, 3),
    ("interleaved_1f1b", 2, 4, "mhc", "bf16-mixed", {}, 2),
    ("zbv", 2, 4, "mhc", "bf16-true", {}, 2),
    ("dualpipev", 2, 5, "mhc", "bf16-mixed", MOE, 2),
]


@pytest.mark.parametrize(
    ("schedule", "devices", "parts", "connection", "precision", "sizes", "block"), RUNS
)
def test_the_fullest_moment_of_each_device_is_predicted(
    schedule, devices, parts, connection, precision, sizes, block, build, peak
):
    model = build(connection, precision, **{**SIZES, **sizes})
    model.set_recompute(block or "off")
    plan = cut_network(model, schedule=schedule, devices=devices)
    batch = MicroBatch(2, 128, precision_of(precision), False, model.recompute_block_size)
    for found in predicted(model, plan, parts, batch):
        device = partial(Device, model, plan, found.device, batch, precision, parts)
        model.zero_grad(set_to_none=True)
        total = found.memory.weights + peak("cpu", two_steps(device, schedule_order(plan, parts)))
        assert found.memory.total == pytest.approx(total, rel=0.1), found


@pytest.mark.parametrize(
    ("schedule", "number", "precision", "sizes"),
    [("1f1b", 0, "32-true", {}), ("gpipe", 1, "bf16-mixed", MOE)],
)
def test_the_fullest_moment_of_shared_stages_is_predicted(
    schedule, number, precision, sizes, build, peak, mesh
):
    model = build("mhc", precision, **{**SIZES, **sizes})
    plan = cut_network(model, schedule=schedule, devices=2)
    batch = MicroBatch(1, 128, precision_of(precision), False)
    predicted_device = predicted(model, plan, 4, batch, DataParallel(1, sharded=True))[number]
    device = partial(Device, model, plan, number, batch, precision, 4, mesh)
    held = peak("cpu", two_steps(device, schedule_order(plan, 4)))
    total = predicted_device.memory.weights + held
    assert predicted_device.memory.total == pytest.approx(total, rel=0.1), predicted_device


def test_boundaries_carry_streams_and_what_goes_with_them(build):
    batch = MicroBatch(2, 64, precision_of("bf16-mixed"), True)
    assert boundary_bytes(build("mhc"), batch) == 2 * 64 * 4 * 32 * 2
    assert boundary_bytes(build("residual"), batch) == 2 * 64 * 32 * 2


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_gradients_that_wait_for_a_memorys_weights_are_counted(conv, precision, build):
    """What the first half of a split backward pass keeps with a memory, above that without."""
    kept, counted = [], []
    for memory in ({}, {"memory": partial(ENGRAM, layers=[3], conv=conv)}):
        model = build("mhc", precision, **SIZES, **memory)
        plan = cut_network(model, schedule="gpipe", devices=2, blocks_per_stage=[2, 2])
        batch = MicroBatch(2, 128, precision_of(precision), False)
        device = Device(model, plan, 1, batch, precision, 1)
        device.forward(1, 0)
        outputs, flow = device.forwards[1, 0]
        parameters = device.stages[1].parameters()
        _, halves = stage_backward_input(list(outputs), None, flow, parameters)
        gradients = [g for half in halves for each in half["grads"] for g in each if g is not None]
        sizes = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}
        kept.append(sum(sizes.values()))
        counted.append(gradients_for_weights(part_of(model, plan.blocks[1]), batch))
    assert counted[1] - counted[0] == kept[1] - kept[0]
