"""The layout that strategies describe, before their processes meet; afterwards see the others."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhc_lightning.errors import UserError
from mhc_lightning.strategies import DataParallelStrategy, FullyShardedStrategy, PipelineStrategy
from mhc_lightning.strategies.layout import Layout, layout_of, pipeline_mesh, ranks_of


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting a rank sets that of the whole process, whose loggers would write no more."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def planned(strategy: Any, devices: int = 4, rank: int = 1) -> Layout:
    """What a strategy says on one node before any process group is there."""
    strategy.parallel_devices = [torch.device("cpu")] * devices
    strategy.cluster_environment = LightningEnvironment()
    strategy.cluster_environment.set_world_size(devices)
    strategy.cluster_environment.set_global_rank(rank)
    layout = layout_of(strategy)
    assert layout.data_parallel_group is None and layout.pipeline_group is None
    return layout


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (DDPStrategy(), Layout(4, 1)),
        (DataParallelStrategy(), Layout(4, 1, materialises_module=True)),
        (ModelParallelStrategy(2, 2), Layout(2)),
        (ModelParallelStrategy(tensor_parallel_size=4), Layout(1)),
        (FullyShardedStrategy(), Layout(4, materialises_module=True)),
    ],
    ids=["Lightning's DDP", "ddp", "2 x 2", "one node", "fsdp"],
)
def test_shares_of_a_batch(strategy: Any, expected: Layout) -> None:
    assert planned(strategy) == expected


def test_stages_of_a_pipeline_have_one_share() -> None:
    layout = planned(PipelineStrategy(pipeline_size=2))
    assert layout.data_parallel_size == 2 and layout.materialises_module
    assert layout.running_micro_batch is not None and layout.running_micro_batch() is None
    assert planned(PipelineStrategy()).data_parallel_size == 1
    with pytest.raises(UserError, match="use a divisor of 4"):
        planned(PipelineStrategy(pipeline_size=3))


@pytest.mark.parametrize(("devices", "replicas"), [(64, 8), (64, 16), (32, 2), (8, 8)])
def test_pipelines_leave_a_node_of_eight_as_seldom_as_they_can(devices: int, replicas: int) -> None:
    nodes, crossings = 8, 0
    for rank in range(devices):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=devices)
        mesh = pipeline_mesh("cpu", ranks_of(replicas, devices // replicas))
        assert mesh["data_parallel"].size() == replicas
        pipeline = mesh["pipeline"].mesh.tolist()
        assert rank in pipeline and len(pipeline) == devices // replicas
        crossings += sum(a // nodes != b // nodes for a, b in pairwise(pipeline))
        dist.destroy_process_group()
    assert crossings == devices * (max(1, devices // replicas // nodes) - 1)


def test_one_process_has_everything_and_reductions_change_nothing() -> None:
    layout = layout_of(SingleDeviceStrategy())
    assert layout == Layout() == Layout(data_parallel_size=1, data_parallel_rank=0)
    tensor = torch.ones(2)
    layout.sum_over_data_parallel(tensor)
    layout.sum_over_pipeline(tensor)
    layout.max_over_pipeline(tensor)
    assert torch.equal(tensor, torch.ones(2))
    assert layout.gather_over_pipeline("value") == ["value"]


def test_a_strategy_of_ones_own_describes_itself() -> None:
    own: Any = SimpleNamespace(layout=lambda: Layout(3, 2))
    assert layout_of(own) == Layout(3, 2)
