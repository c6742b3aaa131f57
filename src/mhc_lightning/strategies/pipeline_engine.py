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
    """The ``loss`` and ``token_losses`` of a network that is spread over a group of processes.

    Every process of the group calls them with the same tokens and gets the same result.

    Args:
        stages: The stages of this process, ascending.
        plan: All stages, and who holds which.
        group: The processes of one pipeline, in order.
        device: This process's.
        micro_batches: Parts that a batch is cut into; None cuts it into single sequences.
        share: Gives the part that one batch has in an optimizer step (one over the batches that
            gradients are accumulated for).
        activity: Where to name what is being done.
        overlap: Whether to let a device's stages run at the same time where the schedule pairs
            them, and to merge a stage's last output on a stream of high priority.

    Attributes:
        last_loss: What ``loss`` returned last with gradients.
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
        """The stages of this process."""
        return [stage.index for stage in self._stages]

    @property
    def place(self) -> tuple[int, int] | None:
        """(stage, micro-batch) of the forward pass that is running in this process, or None."""
        places = [stage.place for stage in self._stages if stage.place is not None]
        return places[0] if places else None

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The mean loss, a scalar without a graph; with gradients on, backward is done by then.

        Gradients are added to those that parameters have. Every target of the batch weighs the
        same, in whichever micro-batch it is.
        """
        if not torch.is_grad_enabled():
            means = self._forward("head_loss", tokens, targets, options)
            weigh = self._weigher(targets, len(means), options)
            weights = torch.stack([weigh(part) for part in targets.tensor_split(len(means))])
            return (means * weights).sum().to(means.dtype)
        parts = self._micro_batches or len(tokens)
        self._plan.check_micro_batches(parts, len(tokens))
        schedule = self._schedule("train", parts, tokens)
        self._weigh = self._weigher(targets, parts, options)
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
        """The loss of each target, as the network's ``head_token_losses`` gives them."""
        return self._forward("head_token_losses", tokens, targets, options)

    def _weigher(
        self, targets: Tensor, parts: int, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """Gives the part that a micro-batch has in the batch's mean, float64, from its targets."""
        network: Any = self._stages[0]._network[0]
        if not hasattr(network, "count_targets"):
            equal = torch.full((), 1 / parts, dtype=torch.float64, device=self._device)
            return lambda part: equal
        total = network.count_targets(targets, **options).clamp(min=1).double()
        return lambda part: network.count_targets(part, **options) / total

    def _forward(
        self, task: str, tokens: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> Tensor:
        wanted = self._micro_batches or len(tokens)
        parts = max(n for n in range(1, wanted + 1) if len(tokens) % n == 0)
        schedule = self._schedule("forward", parts, tokens)
        losses = self._run(schedule, task, tokens, targets, options)
        if losses is None:
            shape = (parts,) if task == "head_loss" else targets.shape
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
        # All micro-batches use one copy of each weight, which the contexts around this one keep
        # until the training step ends; a backward pass in halves takes graphs of its own.
        shares = torch.is_grad_enabled() and not self._plan.kind.splits_backward
        for stage in self._stages:
            stage.restart(task, **options)
            if torch.is_autocast_enabled(kind):
                stage.autocast = torch.autocast(
                    kind, torch.get_autocast_dtype(kind), cache_enabled=shares
                )
        arguments = (tokens,) if self._stages[0].is_first else ()
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

    def _schedule(self, purpose: str, parts: int, tokens: Tensor) -> Any:
        key = purpose, parts, tuple(tokens.shape), tokens.dtype, self._autocast_dtype()
        if key not in self._schedules:
            example = tokens[: len(tokens) // parts]
            build = self._training_schedule if purpose == "train" else self._forward_schedule
            self._schedules[key] = build(example, parts)
        return self._schedules[key]

    def _autocast_dtype(self) -> torch.dtype | None:
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _training_schedule(self, example: Tensor, parts: int) -> Any:
        stages = self._engine_stages(example, overlap=bool(self._streams))
        last = self._streams.get(len(self._plan.blocks) - 1)

        def scaled(losses: Tensor, targets: Tensor) -> Tensor:
            with nullcontext() if last is None else last.turn():
                weight = self._weigh(targets) * self._share()
                return losses.sum() * weight.to(losses.dtype)

        cls: Any = get_schedule_class(self._plan.kind.engine_name)
        one = issubclass(cls, PipelineScheduleSingle)
        return cls(stages[0] if one else stages, parts, loss_fn=scaled, scale_grads=False)

    def _forward_schedule(self, example: Tensor, parts: int) -> Any:
        """The forward half of a schedule that runs everything forward, then everything backward.

        torch's evaluation asserts under V-shaped schedules.
        """
        forward, backward = (_ComputationType.from_str(name) for name in ("F", "B"))
        order: dict[int, list[_Action | None]] = {}
        for device in range(self._plan.devices):
            held = self._plan.stages_of(device)
            order[device] = [
                *(_Action(s, forward, k) for s in held for k in range(parts)),
                *(_Action(s, backward, k) for s in reversed(held) for k in range(parts)),
            ]
        stages = self._engine_stages(example, overlap=False)
        schedule = _PipelineScheduleRuntime(stages, parts, loss_fn=None)
        schedule._prepare_schedule_with_comms(order)
        schedule.pipeline_order_with_comms = {
            device: [action for action in actions if action.computation_type in _FORWARD_HALF]
            for device, actions in schedule.pipeline_order_with_comms.items()
        }
        return schedule

    def _engine_stages(self, part: Tensor, *, overlap: bool) -> list[ScheduledStage]:
        """The stages with the shapes of one micro-batch; nothing is left to be inferred."""

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
        """Shapes and dtypes of what crosses a boundary, as the embedding makes them."""
        found: list[Any] = [None]
        first = self._stages[0]
        if first.is_first:
            first.restart("embed")
            network: Any = first._network[0]
            with torch.no_grad():
                streams = first(part)
            torch.clear_autocast_cache()  # of copies that have no graph
            if not (streams.is_floating_point() and len(streams) == len(part)):
                raise UserError(
                    f"embed returned {streams.dtype} {tuple(streams.shape)} for"
                    f" {len(part)} sequences; strategy=pipeline needs real numbers [batch, ...]"
                )
            carry = network.carry_like(streams) if hasattr(network, "carry_like") else None
            handed_on = [streams] if carry is None else [streams, carry]
            found = [[(tensor.shape, tensor.dtype) for tensor in handed_on]]
        dist.broadcast_object_list(
            found, group=self._group, group_src=self._plan.device_of(0), device=self._device
        )
        return found[0]
