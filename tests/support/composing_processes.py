"""DDP and FSDP2 as a user sets them up, in two processes; what they compute against one process.

Run by torchrun, it prints one line of JSON: what was found wrong in each cell, or nothing.
"""

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from composing_parts import (
    Watched,
    assert_same,
    cross_entropy,
    gains_of,
    layers,
    network,
    tokens,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from networks import MEMORIES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mhc_lightning.modules import HyperConnection


@functools.cache
def outcomes() -> dict[str, str]:
    """Run this file in two processes, once for all cells."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def in_processes(part: str, feature: str) -> None:
    """Fail with what went wrong in one cell."""
    assert not outcomes()[f"{feature} {part}"], outcomes()[f"{feature} {part}"]


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(parameter.grad)
        for name, parameter in module.named_parameters()
    }


def connections(shard: Callable[[nn.Module], nn.Module]) -> None:
    """Each process has one of two sequences; gradients are those of the mean over both."""
    for name, layer, streams in layers():
        layer(streams).square().mean().backward()
        expected = gradients(layer)
        layer.zero_grad()
        split = shard(layer)
        split(streams[dist.get_rank()][None]).square().mean().backward()
        assert_same(
            {f"{name}.{k}": v for k, v in gradients(split).items()},
            {f"{name}.{k}": v for k, v in expected.items()},
        )


def transformers(
    shard: Callable[[nn.Module], nn.Module], build: Callable[[], Any] = network
) -> None:
    net = build()
    cross_entropy(net).backward()
    expected = gradients(net)
    net.zero_grad()
    split = shard(net)
    inputs, targets = (half.chunk(2)[dist.get_rank()] for half in tokens())
    logits = split(inputs).flatten(0, 1)
    nn.functional.cross_entropy(logits, targets.flatten()).backward()
    assert_same(gradients(split), expected)


def memories(shard: Callable[[nn.Module], nn.Module]) -> None:
    """A table's rows are sharded, too; the constants of the hash are whole everywhere."""
    for kind in ("engram", "over_encoding"):
        transformers(shard, functools.partial(network, memory=MEMORIES[kind]))


def ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def fsdp(module: nn.Module) -> Any:
    for block in getattr(module, "blocks", ()):
        fully_shard(block)
    return fully_shard(module)


class Sharded(Watched):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for block in self.net.get_submodule("blocks").children():
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def callbacks(strategy: str | ModelParallelStrategy, kind: type[Watched]) -> None:
    """Every process has the same batch: the gains are those of one process."""
    expected = gains_of(Watched(network(connection=HyperConnection)))
    found = gains_of(kind(network(connection=HyperConnection)), strategy=strategy, devices=2)
    assert found.keys() == expected.keys()
    for tag, value in expected.items():
        assert abs(found[tag] / value - 1) < 1e-5, (tag, found[tag], value)


def main() -> None:
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    cells: dict[str, Callable[[], None]] = {
        "DDP connections": lambda: connections(ddp),
        "DDP Transformer": lambda: transformers(ddp),
        "DDP memory": lambda: memories(ddp),
        "DDP callbacks": lambda: callbacks("ddp", Watched),
        "FSDP2 connections": lambda: connections(fsdp),
        "FSDP2 Transformer": lambda: transformers(fsdp),
        "FSDP2 memory": lambda: memories(fsdp),
        "FSDP2 callbacks": lambda: callbacks(ModelParallelStrategy(), Sharded),
    }
    found = {}
    for name, run in cells.items():
        try:
            run()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()[-2000:]
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
