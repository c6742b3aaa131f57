"""The layout of a run: the shares of a batch and of a model that its processes hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import ExpertParallel


@dataclass(frozen=True)
class Layout:
    """One process's view of the layout. Groups are None until the processes have met.

    Attributes:
        data_parallel_size: Number of shares that a batch is cut into. The stages of a pipeline
            have one share in common, and so do tensor-parallel processes.
        data_parallel_rank: The share of this process; 0 until the processes have met.
        data_parallel_group: The processes that hold the same part of the model as this one, and
            other shares of the batch; None for all processes.
        pipeline_group: The processes of this one's pipeline, in order; None without a pipeline.
        expert_mesh: The mesh over which routed experts are spread: see `expert_mesh`;
            None where every process of a data-parallel group gathers all experts.
        running_micro_batch: Gives (stage, micro-batch) of the forward pass that is running in this
            process, or None between passes. The attribute is None without a pipeline.
        materialises_module: True if a module may come on `meta`: each process then gives memory
            and values to its own part only.
    """

    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_group: dist.ProcessGroup | None = None
    pipeline_group: dist.ProcessGroup | None = None
    expert_mesh: DeviceMesh | None = None
    running_micro_batch: Callable[[], tuple[int, int] | None] | None = None
    materialises_module: bool = False

    def sum_over_data_parallel(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all shares of the batch."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tensor, group=self.data_parallel_group)

    def sum_over_pipeline(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes of a pipeline, if there is one."""
        if self.pipeline_group is not None:
            dist.all_reduce(tensor, group=self.pipeline_group)

    def max_over_pipeline(self, tensor: Tensor) -> None:
        """Replace a tensor by its maximum over the processes of a pipeline, if there is one."""
        if self.pipeline_group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.pipeline_group)

    def gather_over_pipeline(self, value: Any) -> list[Any]:
        """A picklable value of each process of the pipeline, in order; [value] without one."""
        if self.pipeline_group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.pipeline_group)
        dist.all_gather_object(values, value, group=self.pipeline_group)
        return values


@runtime_checkable
class HasLayout(Protocol):
    """A strategy that describes its own layout."""

    def layout(self) -> Layout:
        """The layout, as far as it is known: sizes at any time, groups once processes have met."""
        ...


def layout_of(strategy: Strategy) -> Layout:
    """The layout of any strategy: this package's, Lightning's own, or one with a `layout()`."""
    if isinstance(strategy, HasLayout):
        return strategy.layout()
    if isinstance(strategy, ModelParallelStrategy):
        size = strategy._data_parallel_size
        return mesh_layout(strategy, strategy.num_nodes if isinstance(size, str) else size)
    if isinstance(strategy, ParallelStrategy):
        sampler = strategy.distributed_sampler_kwargs or {}
        return Layout(sampler.get("num_replicas", 1), sampler.get("rank", 0))
    return Layout()


def mesh_layout(strategy: ModelParallelStrategy, planned_size: int, **more: Any) -> Layout:
    """The layout of a strategy whose device mesh has a `data_parallel` dimension.

    Args:
        strategy: The strategy, before or after its processes have met.
        planned_size: The data-parallel size, for as long as there is no mesh.
        more: Other attributes of the layout.
    """
    if strategy._device_mesh is None:
        return Layout(planned_size, **more)
    mesh = strategy.device_mesh["data_parallel"]
    return Layout(mesh.size(), mesh.get_local_rank(), mesh.get_group(), **more)


def ranks_of(replicas: int, stages: int, sharing: int = 1) -> Tensor:
    """The rank of each place [replicas, stages]: of a data-parallel device, in its pipeline.

    As `DataParallel.rank` says. n streams between stages are n times what other networks send
    there, so neighbours share a node where they fit; gradients of replicas cross nodes once a step.

    Args:
        replicas: The data-parallel devices of a stage.
        stages: The devices of a pipeline.
        sharing: Neighbours among the replicas that share experts.
    """
    places = DataParallel(replicas, pipeline_size=stages, experts=ExpertParallel(sharing))
    return torch.tensor(
        [[places.rank(device, stage) for stage in range(stages)] for device in range(replicas)]
    )


def pipeline_mesh(device_type: str, ranks: Tensor) -> DeviceMesh:
    """The mesh (`data_parallel`, `pipeline`) of all processes, from their `ranks_of`."""
    return DeviceMesh(device_type, ranks, mesh_dim_names=("data_parallel", "pipeline"))
