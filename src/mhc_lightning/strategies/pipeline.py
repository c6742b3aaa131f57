"""Pipeline parallelism for Lightning, on torch.distributed.pipelining."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from mhc_lightning.checkpoints.distributed_state import DistributedState
from mhc_lightning.checkpoints.portable_strategy import PortableStrategy
from mhc_lightning.errors import UserError
from mhc_lightning.planning.expert_parallel import ExpertParallel
from mhc_lightning.planning.stages import (
    SCHEDULES,
    StagePlan,
    cut_network,
    pipeline_size_of,
)
from mhc_lightning.strategies.expert_parallel import expert_mesh
from mhc_lightning.strategies.gradient_norm import clip_by_global_norm
from mhc_lightning.strategies.layout import Layout, mesh_layout, pipeline_mesh, ranks_of
from mhc_lightning.strategies.optimization_loop import run_backward_within_step
from mhc_lightning.strategies.pipeline_engine import PipelineEngine
from mhc_lightning.strategies.pipeline_stage import Stage, find_network, leave_out
from mhc_lightning.strategies.placements import place_tables
from mhc_lightning.strategies.sharded_rows import store_sharded_rows, tables_of
from mhc_lightning.strategies.sharding import bring_to_life, shard_parts
from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class PipelineStrategy(WatchedStrategy, PortableStrategy):
    """Cuts a network into stages on different devices; several pipelines are data-parallel.

    The LightningModule needs no change: it has one network that is a `PipelinedNetwork` (as
    `Transformer` is), and returns `network.loss(tokens, targets)` from `training_step`. The loss is
    the same on every process. The backward pass has run when `network.loss` returns. So values
    computed from the loss afterwards have no gradient, and a `training_step` that returns anything
    else is refused.

    Several pipelines share the batch, and shard each stage's parameters, gradients and optimizer
    state (FSDP2). A run resumes under any strategy and number of devices.

    Args:
        schedule: `gpipe`, `1f1b`, `interleaved_1f1b`, `zbv` or `dualpipev`.
        microbatches: Number of micro-batches that the sequences of a forward pass are cut into;
            None for single sequences.
        pipeline_size: Devices of one pipeline; None for one pipeline of all devices.
        blocks_per_stage: Number of blocks in each stage; None balances the predicted cost,
            embedding and head included.
        timeout_seconds: Longest time that a process waits for another; one that others wait for
            longer counts as hung.
        overlap: Under `dualpipev`, run a device's two stages on streams of their own, so that the
            forward pass of one micro-batch and the backward pass of another overlap, and merge the
            output that a stage sends on a stream of high priority. Results are bit for bit equal.
            Not run on a GPU yet; without effect on a CPU.
        expert_parallel_size: Processes that share the routed experts of each block of a stage, out
            of those of several pipelines that hold the stage: see `FullyShardedStrategy`.

    A module may come with its network on `meta`: each process gives memory and values only to its
    stages.

    If a process fails or hangs, the others print its rank, its stages and the cause, and end. A
    process that hangs ends too.

    Raises:
        UserError: There is no such schedule, or a number is out of range.
    """

    def __init__(
        self,
        schedule: str = "1f1b",
        microbatches: int | None = None,
        pipeline_size: int | None = None,
        blocks_per_stage: list[int] | None = None,
        timeout_seconds: float = 1800,
        overlap: bool = False,
        expert_parallel_size: int = 1,
    ) -> None:
        super().__init__(timeout_seconds, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if schedule not in SCHEDULES:
            raise UserError(
                f"strategy.schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}"
            )
        self.schedule = schedule
        self.micro_batches = microbatches
        self.pipeline_size = pipeline_size
        self.blocks_per_stage = blocks_per_stage
        self.overlap = overlap
        self.expert_parallel_size = ExpertParallel(expert_parallel_size).size
        self._expert_mesh: DeviceMesh | None = None
        self._engine: PipelineEngine | None = None
        self._whole: DistributedState | None = None

    # ---- the layout

    def layout(self) -> Layout:
        """Pipelines share the batch; the sizes are known before any process group exists.

        Raises:
            UserError: The devices cannot be shared out.
        """
        devices = self.num_nodes * self.num_processes
        return mesh_layout(
            self,
            planned_size=devices // pipeline_size_of(devices, self.pipeline_size),
            pipeline_group=None if self._device_mesh is None else self._pipeline_group,
            expert_mesh=self._expert_mesh,
            running_micro_batch=lambda: (
                None if self._engine is None else self._engine.running_micro_batch
            ),
            materialises_module=True,
        )

    @property
    def _pipeline_group(self) -> dist.ProcessGroup:
        """The processes of this one's pipeline."""
        return self.device_mesh["pipeline"].get_group()

    def plan(self, network: Any) -> StagePlan:
        """The stages of a network, which may be on `meta`.

        Raises:
            UserError: The network or the devices do not fit the schedule.
        """
        devices = self.num_nodes * self.num_processes
        return cut_network(
            network,
            schedule=self.schedule,
            devices=pipeline_size_of(devices, self.pipeline_size),
            blocks_per_stage=self.blocks_per_stage,
        )

    def check(self, module: pl.LightningModule, batch: int | None = None) -> None:
        """Refuse a module or settings that cannot run, before any process group exists.

        Args:
            module: The module to train.
            batch: Sequences of one forward pass, if known.

        Raises:
            UserError: Says what is wrong, and what to use instead.
        """
        network = find_network(module)
        plan = self.plan(network)
        replicas = self.num_nodes * self.num_processes // plan.devices
        ExpertParallel(self.expert_parallel_size).check(module, replicas)
        if str(self.precision_plugin.precision).startswith("16"):
            raise UserError(
                f"trainer.precision={self.precision_plugin.precision} is not supported by"
                " strategy=pipeline, which cannot scale losses; use bf16-mixed"
            )
        if plan.kind.splits_backward and (
            getattr(module, "compile_sublayers", False) or _is_compiled(network)
        ):
            others = [name for name, kind in SCHEDULES.items() if not kind.splits_backward]
            raise UserError(
                f"strategy.schedule={self.schedule} takes gradients of inputs and weights at"
                " different times, which compiled code cannot; use compile=false, or one of"
                f" {', '.join(others)}"
            )
        if batch is not None:
            plan.check_micro_batches(self.micro_batches or batch, batch)

    # ---- what Lightning calls

    def setup_environment(self) -> None:
        """Check the layout, then start the process group and its mesh."""
        assert self.lightning_module is not None
        if self._engine is None:
            trainer = self.lightning_module.trainer
            loaded = getattr(trainer, "datamodule", None)
            training = trainer.state.fn == TrainerFn.FITTING
            batch = getattr(loaded, "micro_batch_size", None) if training else None
            self.check(self.lightning_module, batch)
        self._setup_distributed()
        replicas = self.layout().data_parallel_size
        kind, size = self.root_device.type, self.expert_parallel_size
        ranks = ranks_of(replicas, self.world_size // replicas, size)
        self._device_mesh = pipeline_mesh(kind, ranks)
        if size > 1 and self._expert_mesh is None:
            self._expert_mesh = expert_mesh(kind, size, ranks)
        self.start_watch()

    def setup(self, trainer: pl.Trainer) -> None:
        """Keep this process's stages of the network, shard them, and set up optimizers."""
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        if self._engine is None:
            self._split()
        stages = ", ".join(map(str, self._engine.stage_numbers))  # type: ignore[union-attr]
        self.start_watch(f"pipeline stage {stages}")
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            run_backward_within_step(trainer)
        self.setup_precision_plugin()
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `training_step`, in which the network's loss runs the schedule.

        Raises:
            UserError: The module's step returned anything but that loss.
        """
        assert self._engine is not None
        self._engine.last_loss = None
        out = super().training_step(*args, **kwargs)
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if loss is None or loss is not self._engine.last_loss:
            raise UserError(
                "under strategy=pipeline training_step must return what the network's loss"
                " returned, unchanged: its gradients have been computed by then"
            )
        return out

    def distributed_state(self) -> DistributedState:
        """Every process has its stages, or shards of them."""
        assert self._whole is not None
        return self._whole

    # ---- parts of the above

    def _split(self) -> None:
        assert self.model is not None
        network: Any = find_network(self.model)
        plan = self.plan(network)
        mesh = self.device_mesh
        self._whole = DistributedState(
            self.model, self.root_device, mesh["data_parallel"], mesh["pipeline"]
        )
        own = plan.stages_of(self.device_mesh["pipeline"].get_local_rank())
        count = len(plan.blocks)
        if hasattr(network, "set_recompute"):
            network.set_recompute(network.recompute, [len(blocks) for blocks in plan.blocks])
        stages = [Stage(network, plan.blocks[index], index, count) for index in own]
        _keep_counting_flops(network)
        for stage in stages:
            if not any(parameter.is_meta for parameter in stage.parameters()):
                stage.to(self.root_device)
        replicas = self.device_mesh["data_parallel"]
        for stage in stages:
            tables, several = tables_of(stage).values(), replicas.size() > 1
            placed = place_tables(network, tables, replicas if several else None)
            if several:
                mixed = "bf16" in str(self.precision_plugin.precision)
                shard_parts(
                    stage,
                    stage.blocks.values(),
                    replicas,
                    torch.bfloat16 if mixed else None,
                    reshard_after_forward=False,
                    ignored=placed,
                    experts=self._expert_mesh,
                )
        everywhere = [getattr(network, n) for n in getattr(network, "parts_of_all_stages", ())]
        bring_to_life([*stages, *everywhere], self.root_device)
        for stage in stages:
            store_sharded_rows(stage)
        leave_out(network, stages)
        self.model_to_device()
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        self._engine = PipelineEngine(
            stages,
            plan,
            self._pipeline_group,
            self.root_device,
            self.micro_batches,
            lambda: 1 / trainer.accumulate_grad_batches,
            self.activity,
            self.overlap,
        )
        network.loss = self._engine.loss
        network.token_losses = self._engine.token_losses

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip_by_global_norm(parameters, clip_val, self._pipeline_group)


def _is_compiled(network: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())


def _keep_counting_flops(network: Any) -> None:
    """Keep `flops_per_token` that of the whole network: it is linear in the sequence length."""
    if hasattr(network, "flops_per_token"):
        fixed = network.flops_per_token(0)
        each = network.flops_per_token(1) - fixed
        network.flops_per_token = lambda sequence_length: fixed + each * sequence_length
