"""Runs a network's stages under a schedule of torch.distributed.pipelining."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from mhc_lightning.errors import UserError
from mhc_lightning.planning.stages import StagePlan
from mhc_lightning.strategies.main_thread import Activity
from mhc_lightning.strategies.pipeline_stage import Stage
from mhc_lightning.strategies.scheduled_stage import OverlappingStage, ScheduledStage, StageStreams

_FORWARD_HALF = tuple(
    _ComputationType.from_str(name) for name in ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
)


class PipelineEngine:
    """The `loss` and `token_losses` of a network that is spread over a group of processes.

    Every process of the group calls them with the same tokens and gets the same result.

    Args:
        stages: The stages of this process, ascending.
        plan: All stages, and the process that holds each.
        group: The processes of one pipeline, in order.
        device: This process's device.
        micro_batches: Number of micro-batches of a batch; None for single sequences.
        share: Gives the weight of one batch in an optimizer step (1 / accumulated batches).
        activity: Gets the name of the running pass.
        overlap: True to let a device's stages run at the same time where the schedule pairs
            them, and to merge a stage's last output on a stream of high priority.

    Attributes:
        last_loss: The last result of `loss` with gradients.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        plan: StagePlan,
        group: dist.ProcessGroup,
        device: torch.device,
        micro_batches: int | None,
        share: Callable[[], float],
        activity: Activity,
        overlap: bool = False,
    ) -> None:
        self._stages = stages
        self._plan = plan
        self._group = group
        self._device = device
        self._micro_batches = micro_batches
        self._share = share
        self._activity = activity
        self._streams: dict[int, StageStreams] = {}
        if overlap and plan.kind.pairs_stages:
            self._streams = {stage.index: StageStreams(device) for stage in stages}
            for stage in stages:
                stage.merge_last_with(self._streams[stage.index].merge)
        self._schedules: dict[tuple[Any, ...], Any] = {}
        self._loss_dtype = torch.float32
        self.last_loss: Tensor | None = None

    @property
    def stage_numbers(self) -> list[int]:
        """Numbers of the stages of this process."""
        return [stage.index for stage in self._stages]

    @property
    def running_micro_batch(self) -> tuple[int, int] | None:
        """(stage, micro-batch) of the forward pass that is running in this process, or None."""
        running = [stage.running for stage in self._stages if stage.running is not None]
        return running[0] if running else None

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The mean loss, a scalar without a graph; with gradients on, backward has run.

        The pass adds gradients to those that parameters have. All targets of the batch weigh the
        same, in whichever micro-batch they are.
        """
        if not torch.is_grad_enabled():
            means = self._forward("head_loss", tokens, targets, options)
            weigh = self._weigher(targets, len(means), options)
            weights = torch.stack([weigh(some) for some in targets.tensor_split(len(means))])
            return (means * weights).sum().to(means.dtype)
        count = self._micro_batches or len(tokens)
        self._plan.check_micro_batches(count, len(tokens))
        schedule = self._schedule("train", count, tokens)
        self._weigh = self._weigher(targets, count, options)
        losses: list[Tensor] = []
        self._run(
            schedule, "head_loss", tokens, targets, options, losses=losses, return_outputs=False
        )
        mean = torch.zeros((), dtype=self._loss_dtype, device=self._device)
        if losses:
            mean = torch.stack(losses).detach().sum().to(self._loss_dtype) / self._share()
        self._broadcast(mean)
        self.last_loss = mean
        return mean

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of each target [B, S], from the network's `head_token_losses`."""
        return self._forward("head_token_losses", tokens, targets, options)

    def _weigher(
        self, targets: Tensor, count: int, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """A function from a micro-batch's targets to its weight in the batch's mean, in float64."""
        network: Any = self._stages[0]._network[0]
        if not hasattr(network, "count_targets"):
            equal = torch.full((), 1 / count, dtype=torch.float64, device=self._device)
            return lambda targets: equal
        total = network.count_targets(targets, **options).clamp(min=1).double()
        return lambda targets: network.count_targets(targets, **options) / total

    def _forward(
        self, task: str, tokens: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> Tensor:
        wanted = self._micro_batches or len(tokens)
        count = max(n for n in range(1, wanted + 1) if len(tokens) % n == 0)
        schedule = self._schedule("forward", count, tokens)
        losses = self._run(schedule, task, tokens, targets, options)
        if losses is None:
            shape = (count,) if task == "head_loss" else targets.shape
            losses = torch.zeros(shape, device=self._device)
        losses = losses.detach().to(self._loss_dtype).contiguous()
        self._broadcast(losses)
        return losses

    def _run(
        self,
        schedule: Any,
        task: str,
        tokens: Tensor,
        targets: Tensor,
        options: dict[str, Any],
        **settings: Any,
    ) -> Any:
        kind = self._device.type
        # All micro-batches use one cast copy of each weight, which the outer autocast contexts
        # keep until the training step ends. A backward pass in halves needs graphs of its own.
        shares = torch.is_grad_enabled() and not self._plan.kind.splits_backward
        for stage in self._stages:
            stage.restart(task, **options)
            if torch.is_autocast_enabled(kind):
                stage.autocast = torch.autocast(
                    kind, torch.get_autocast_dtype(kind), cache_enabled=shares
                )
        arguments = (tokens,) if self._stages[0].is_first else ()
        if hasattr(self._stages[0]._network[0], "recall"):
            settings["tokens"] = tokens
        if self._stages[-1].is_last:
            settings["targets"] = targets
            if "losses" in settings:
                settings["target"] = targets
        with torch.autocast(kind, enabled=False):
            out = schedule.step(*arguments, **settings)
        for stage in schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]:
            stage.clear_runtime_states()
        return out

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, group=self._group, group_src=self._plan.last_device)

    def _schedule(self, purpose: str, count: int, tokens: Tensor) -> Any:
        key = purpose, count, tuple(tokens.shape), tokens.dtype, self._autocast_dtype()
        if key not in self._schedules:
            example = tokens[: len(tokens) // count]
            build = self._training_schedule if purpose == "train" else self._forward_schedule
            self._schedules[key] = build(example, count)
        return self._schedules[key]

    def _autocast_dtype(self) -> torch.dtype | None:
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _training_schedule(self, example: Tensor, count: int) -> Any:
        stages = self._scheduled_stages(example, overlap=bool(self._streams))
        last = self._streams.get(len(self._plan.blocks) - 1)

        def scaled(losses: Tensor, targets: Tensor) -> Tensor:
            with nullcontext() if last is None else last.turn():
                weight = self._weigh(targets) * self._share()
                return losses.sum() * weight.to(losses.dtype)

        cls: Any = get_schedule_class(self._plan.kind.engine_name)
        one = issubclass(cls, PipelineScheduleSingle)
        return cls(stages[0] if one else stages, count, loss_fn=scaled, scale_grads=False)

    def _forward_schedule(self, example: Tensor, count: int) -> Any:
        """The forward half of a schedule of all forward passes, then all backward passes.

        torch's own evaluation fails under V-shaped schedules.
        """
        forward, backward = (_ComputationType.from_str(name) for name in ("F", "B"))
        order: dict[int, list[_Action | None]] = {}
        for device in range(self._plan.devices):
            held = self._plan.stages_of(device)
            order[device] = [
                *(_Action(s, forward, k) for s in held for k in range(count)),
                *(_Action(s, backward, k) for s in reversed(held) for k in range(count)),
            ]
        stages = self._scheduled_stages(example, overlap=False)
        schedule = _PipelineScheduleRuntime(stages, count, loss_fn=None)
        schedule._prepare_schedule_with_comms(order)
        schedule.pipeline_order_with_comms = {
            device: [action for action in actions if action.computation_type in _FORWARD_HALF]
            for device, actions in schedule.pipeline_order_with_comms.items()
        }
        return schedule

    def _scheduled_stages(self, part: Tensor, *, overlap: bool) -> list[ScheduledStage]:
        """Torch's stages, with the shapes of one micro-batch: torch need not infer any."""

        def example(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            wants = dtype.is_floating_point
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=wants)

        between = [example(*meta) for meta in self._boundary(part)]
        if between[0].dtype == torch.float64:
            self._loss_dtype = torch.float64
        count = len(self._plan.blocks)
        build: Any = partial(OverlappingStage, streams=self._streams) if overlap else ScheduledStage
        return [
            build(
                stage,
                stage.index,
                count,
                self._device,
                input_args=(example(part.shape, part.dtype),) if stage.is_first else (*between,),
                output_args=(example((1,), self._loss_dtype),) if stage.is_last else (*between,),
                group=self._group,
                activity=self._activity,
            )
            for stage in self._stages
        ]

    def _boundary(self, part: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the tensors between two stages, as the embedding makes them."""
        shapes: list[Any] = [None]
        first = self._stages[0]
        if first.is_first:
            first.restart("embed")
            network: Any = first._network[0]
            with torch.no_grad():
                streams = first(part)
            torch.clear_autocast_cache()  # its copies have no graph
            if not (streams.is_floating_point() and len(streams) == len(part)):
                raise UserError(
                    f"embed returned {streams.dtype} {tuple(streams.shape)} for"
                    f" {len(part)} sequences; strategy=pipeline needs real numbers [batch, ...]"
                )
            carry = network.carry_like(streams) if hasattr(network, "carry_like") else None
            outputs = [streams] if carry is None else [streams, carry]
            shapes = [[(tensor.shape, tensor.dtype) for tensor in outputs]]
        dist.broadcast_object_list(
            shapes, group=self._group, group_src=self._plan.device_of(0), device=self._device
        )
        return shapes[0]
