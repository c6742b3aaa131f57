"""`strategy=pipeline_or_fsdp`: the choice between the two, from the number of devices alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from mhc_lightning.planning.stages import StagePlan

NAME = "pipeline_or_fsdp"
EVEN = 0.85  # the mean device's predicted work over the busiest one's, at least
_PARTS = 4  # micro-batches per device of a pipeline, at most

_TARGETS = {
    "pipeline": "mhc_lightning.strategies.PipelineStrategy",
    "fsdp": "mhc_lightning.strategies.FullyShardedStrategy",
}


@dataclass(frozen=True)
class Work:
    """The work of an optimizer step, which devices share.

    Attributes:
        costs: Relative time of each block.
        before: Relative time of the embedding.
        after: Relative time of the head.
        batch_size: Sequences per optimizer step.
        micro_batch_size: Sequences of one micro-batch.
    """

    costs: Sequence[float]
    before: float
    after: float
    batch_size: int
    micro_batch_size: int


@dataclass(frozen=True)
class Pipelines:
    """A layout that was chosen.

    Attributes:
        count: Pipelines that share a batch.
        size: Devices of each.
        microbatches: Parts that enter a pipeline together.
    """

    count: int
    size: int
    microbatches: int


def choose_pipelines(
    work: Work,
    devices: int,
    per_node: int,
    *,
    schedule: str,
    microbatches: int | None = None,
    pipeline_size: int | None = None,
    blocks_per_stage: Sequence[int] | None = None,
) -> Pipelines:
    """The longest pipelines that lie on one node and share the work evenly.

    Longer pipelines leave less to be sharded and gathered; uneven ones leave devices idle.

    Args:
        work: The work to share.
        devices: Devices of all nodes.
        per_node: Devices of one node.
        schedule: A key of `SCHEDULES`.
        microbatches: As asked for, or None.
        pipeline_size: As asked for (however uneven), or None.
        blocks_per_stage: As asked for, or None.

    Raises:
        UserError: No pipeline is possible; the message names the reason for the shortest.
    """
    from mhc_lightning.planning.stages import pipeline_size_of, plan_stages

    if devices < 2:
        raise UserError("there is one device")
    sizes = [n for n in range(2, per_node + 1) if per_node % n == 0]
    if pipeline_size is not None or not sizes:  # or nodes of one device
        sizes = [pipeline_size_of(devices, pipeline_size)]
    reason: UserError | None = None
    for size in reversed(sizes):
        try:
            plan = plan_stages(
                work.costs,
                schedule=schedule,
                devices=size,
                before=work.before,
                after=work.after,
                blocks_per_stage=blocks_per_stage,
            )
            even = evenness(plan, work)
            if even < EVEN and pipeline_size is None:
                raise UserError(
                    f"{size} devices would share the blocks unevenly: {even:.0%} of the busiest"
                    " one's work on average"
                )
            count = devices // size
            return Pipelines(count, size, _parts(plan, work, count, microbatches))
        except UserError as error:
            reason = error
    assert reason is not None
    raise reason


def evenness(plan: "StagePlan", work: Work) -> float:
    """The mean device's predicted work, over that of the busiest."""
    times = [0.0] * plan.devices
    for stage, blocks in enumerate(plan.blocks):
        times[plan.device_of(stage)] += sum(work.costs[k] for k in blocks)
    times[plan.device_of(0)] += work.before
    times[plan.last_device] += work.after
    return sum(times) / len(times) / max(times)


def _parts(plan: "StagePlan", work: Work, count: int, wanted: int | None) -> int:
    """Micro-batches for one pass through a pipeline; as many passes follow as the batch needs."""
    whole, rest = divmod(work.batch_size, count * work.micro_batch_size)
    if rest or not whole:
        raise UserError(
            f"data.batch_size={work.batch_size} is not shared evenly by {count} pipelines in"
            f" micro-batches of data.micro_batch_size={work.micro_batch_size}"
        )
    most = max(_PARTS * plan.devices, len(plan.blocks))
    choices = [wanted] if wanted else [n for n in range(most, 0, -1) if whole % n == 0]
    reason: UserError | None = None
    for parts in choices:
        try:
            if whole % parts:
                raise UserError(
                    f"strategy.microbatches={parts} does not divide the {whole} micro-batches that"
                    " a pipeline has per optimizer step"
                )
            plan.check_micro_batches(parts, parts * work.micro_batch_size)
            return parts
        except UserError as error:
            reason = reason or error
    assert reason is not None
    raise reason


def resolve_strategy(
    experiment: Experiment, devices: int | None = None, per_node: int | None = None
) -> tuple[Experiment, str | None]:
    """The experiment with this strategy replaced by the one chosen, and a line that names it.

    Args:
        experiment: With any strategy; other strategies stay as they are.
        devices: Devices of all nodes; None takes this machine's and the trainer's settings.
        per_node: Devices of one node.

    Raises:
        UserError: There is no such schedule, or the settings given rule out every layout.
    """
    if OmegaConf.select(experiment.config, "strategy.name") != NAME:
        return experiment, None
    from mhc_lightning.planning.stages import SCHEDULES

    values = experiment.values()
    if devices is None:
        per_node = devices_per_node(values["trainer"])
        devices = per_node * values["trainer"].get("num_nodes", 1)
    settings = {k: v for k, v in values["strategy"].items() if k != "name"}
    layout = {k: v for k, v in settings.items() if k not in ("timeout_seconds", "overlap")}
    asked_for = any(value is not None for key, value in layout.items() if key != "schedule")
    config = experiment.config.copy()
    try:
        kind = SCHEDULES.get(layout["schedule"])
        if values["compile"] and kind is not None and kind.splits_backward:
            raise UserError(f"compile=true does not go with strategy.schedule={layout['schedule']}")
        chosen = choose_pipelines(_work(experiment), devices, per_node or devices, **layout)
    except UserError as error:
        if layout["schedule"] not in SCHEDULES or (asked_for and devices > 1):
            raise
        sharded = {"_target_": _TARGETS["fsdp"], "timeout_seconds": settings["timeout_seconds"]}
        OmegaConf.update(config, "strategy", sharded, merge=False)
        return replace(experiment, config=config), f"strategy: fsdp, not pipeline, since {error}"
    settings |= {"pipeline_size": chosen.size, "microbatches": chosen.microbatches}
    settings = {"_target_": _TARGETS["pipeline"], **settings}
    OmegaConf.update(config, "strategy", settings, merge=False)
    together = chosen.microbatches * (values["data"]["micro_batch_size"] or 1)
    OmegaConf.update(config, "data.micro_batch_size", together)
    pipelines = f"{chosen.count} pipeline{'s' * (chosen.count > 1)} of {chosen.size} devices"
    return replace(experiment, config=config), (
        f"strategy: {pipelines}, schedule {settings['schedule']},"
        f" {chosen.microbatches} micro-batches (data.micro_batch_size={together})"
    )


def devices_per_node(trainer: dict[str, Any]) -> int:
    """The number of devices that Lightning's trainer will use here, by its settings."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    if "," in str(devices):  # indices of GPUs, as in CUDA_VISIBLE_DEVICES
        return len([index for index in str(devices).split(",") if index.strip()])
    import torch  # auto, or -1 for all

    on_gpu = trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


def _work(experiment: Experiment) -> Work:
    from mhc_lightning.cli.instantiation import build
    from mhc_lightning.planning import ShapesOnly
    from mhc_lightning.planning.stages import block_cost

    with ShapesOnly():
        network = build(experiment, "model")
    if not hasattr(network, "parts_before_blocks"):  # as `strategies.PipelinedNetwork` has
        raise UserError(f"{type(network).__name__} cannot be cut into stages")
    data = experiment.values()["data"]
    return Work(
        costs=[block_cost(block) for block in network.blocks],
        before=sum(block_cost(getattr(network, name)) for name in network.parts_before_blocks),
        after=sum(block_cost(getattr(network, name)) for name in network.parts_behind_blocks),
        batch_size=data["batch_size"],
        micro_batch_size=data["micro_batch_size"] or 1,
    )
