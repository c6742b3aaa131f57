"""The settings of a strategy, as `plan` reads them: without importing Lightning."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_lightning.cli.value_types import check_arguments
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    from mhc_lightning.modules import Transformer
    from mhc_lightning.planning import Pipeline, PipelineForecast

PIPELINE_STRATEGY = "pipelinestrategy"


@dataclass(frozen=True)
class PipelineSettings:
    """The arguments of `PipelineStrategy`, with its defaults (a test compares them)."""

    schedule: str = "1f1b"
    microbatches: int | None = None
    pipeline_size: int | None = None
    blocks_per_stage: list[int] | None = None
    timeout_seconds: float = 1800
    overlap: bool = False
    expert_parallel_size: int = 1

    def replicas(self, devices: int) -> int:
        """Pipelines that share a batch.

        Raises:
            UserError: The devices cannot be shared out.
        """
        from mhc_lightning.planning.stages import pipeline_size_of

        return devices // pipeline_size_of(devices, self.pipeline_size)


def strategy_name(strategy: dict[str, Any]) -> str:
    """A strategy's name or class, in lower case."""
    return str(strategy.get("name") or strategy.get("_target_")).rpartition(".")[2].lower()


def is_sharded(strategy: dict[str, Any]) -> bool:
    """True if a strategy that is no pipeline shards the model over the devices (FSDP).

    Lightning is imported for classes of other packages only.
    """
    target = str(strategy.get("_target_") or "")
    if not target or target.startswith("mhc_lightning."):
        return target.endswith(".FullyShardedStrategy")
    from hydra.utils import get_object
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    try:
        kind = get_object(target)
    except Exception:  # `fit` names what is wrong with it
        return False
    return isinstance(kind, type) and issubclass(kind, (FSDPStrategy, ModelParallelStrategy))


def read_settings(strategy: dict[str, Any]) -> PipelineSettings:
    """The settings of a pipeline.

    Raises:
        UserError: One is not known, or of the wrong type.
    """
    values = {key: value for key, value in strategy.items() if not key.startswith("_")}
    check_arguments("strategy", PipelineSettings, values)
    return PipelineSettings(**values)


def check_pipeline_settings(values: dict[str, Any]) -> None:
    """Refuse settings of pipelines under another strategy, and a picture that cannot be written.

    Raises:
        UserError: names the setting, and how to fix it.
    """
    pipelined = strategy_name(values["strategy"]) == PIPELINE_STRATEGY
    for key in ("picture", "times"):
        if values.get(key) is not None and not pipelined:
            raise UserError(f"{key}={values[key]} is for pipelines; add strategy=pipeline")
    picture = values.get("picture")
    if picture is None:
        return
    if Path(picture).suffix.lower() != ".png":
        raise UserError(f"picture={picture} must be the name of a .png file")
    if not Path(picture).parent.is_dir():
        raise UserError(f"picture={picture}: there is no folder {Path(picture).parent}")


def pipeline_of(
    values: dict[str, Any],
    settings: PipelineSettings,
    model: "Transformer",
    devices: int,
    micro_batch_size: int,
) -> "Pipeline":
    """The layout of a run as a pipeline.

    Args:
        values: The experiment's values.
        settings: The settings of its strategy.
        model: The network to cut into stages.
        devices: Devices of one pipeline.
        micro_batch_size: Sequences of one pass.

    Raises:
        UserError: The layout does not fit the schedule, or the file of times not the layout.
    """
    from mhc_lightning.planning import Pipeline, read_times
    from mhc_lightning.planning.stages import cut_network

    plan = cut_network(
        model,
        schedule=settings.schedule,
        devices=devices,
        blocks_per_stage=settings.blocks_per_stage,
    )
    parts = micro_batch_size if settings.microbatches is None else settings.microbatches
    plan.check_micro_batches(parts, micro_batch_size)
    measured = None
    if values.get("times") is not None:
        measured = read_times(values["times"])
        measured.check(len(plan.blocks))
    return Pipeline(plan, parts, values["recompute"], measured)


def draw(name: str, forecast: "PipelineForecast", file: str) -> None:
    """Write a picture of a pipeline's timeline.

    Raises:
        UserError: The file cannot be written.
    """
    from mhc_lightning.planning.timeline_picture import draw_timelines

    try:
        draw_timelines(name, forecast, file)
    except OSError as error:
        raise UserError(f"picture={file} cannot be written: {error}") from error
