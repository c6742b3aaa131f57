"""The trainer, the data module and the model of an experiment."""

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.instantiation import build, require_section, target_of
from mhc_lightning.cli.run_folder import is_first_process
from mhc_lightning.cli.strategy_choice import devices_per_node, resolve_strategy
from mhc_lightning.errors import UserError

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from mhc_lightning import LanguageModel, TextDataModule

# Arguments of Lightning's Trainer that follow from other settings, and what sets them.
_SET_OTHERWISE = {
    "accumulate_grad_batches": "it follows from data.batch_size and data.micro_batch_size",
    "callbacks": "they have a section of their own, `callbacks`",
    "check_val_every_n_epoch": "trainer.val_check_interval counts optimizer steps",
    "default_root_dir": "it is output_dir",
    "enable_model_summary": "`plan` prints the parameters of a model",
    "fast_dev_run": "trainer.max_steps=1 makes a run short",
    "logger": "they have a section of their own, `logger`",
    "num_sanity_val_steps": "trainer.val_check_interval says when to validate",
    "strategy": "choose strategy=ddp, fsdp or pipeline, without `trainer.` before it",
    "use_distributed_sampler": "the data are spread over all devices anyway",
}


def build_trainer(experiment: Experiment, **more: Any) -> "pl.Trainer":
    """The trainer, without callbacks and loggers unless given, for the configured strategy.

    `strategy=pipeline_or_fsdp` becomes one of the two: see `strategy_choice.resolve_strategy`.

    Intervals are optimizer steps in the configuration and batches in Lightning: see
    `count_optimizer_steps`.
    """
    experiment, _ = resolve_strategy(experiment)
    config = experiment.config
    require_section(experiment, "trainer")
    strategy: Any = OmegaConf.select(config, "strategy.name")
    if strategy is None:
        strategy = build(experiment, "strategy")
    elif strategy == "auto" and _spreads(experiment.values()["trainer"]):
        from mhc_lightning.strategies import DataParallelStrategy

        strategy = DataParallelStrategy()  # Lightning's choice, whose processes watch each other
    interval = config.trainer.val_check_interval
    if not isinstance(interval, int) or interval < 1:
        raise UserError(
            f"trainer.val_check_interval must be a whole number of optimizer steps, at least 1,"
            f" not {interval!r}; for no validation: trainer.limit_val_batches=0"
        )
    clip = config.trainer.gradient_clip_val
    if clip is not None and not clip >= 0:
        raise UserError(f"trainer.gradient_clip_val must be at least 0, or null, not {clip}")
    if str(config.trainer.precision) in ("16-mixed", "16"):
        raise UserError(
            f"trainer.precision={config.trainer.precision} is not supported (gradients would be"
            " clipped at their scaled size); use bf16-mixed"
        )
    for name, instead in _SET_OTHERWISE.items():
        if name in config.trainer:
            raise UserError(f"trainer.{name} cannot be set here: {instead}")
    steps, every = config.trainer.max_steps, config.trainer.log_every_n_steps
    for name, value, least in (("max_steps", steps, 1), ("log_every_n_steps", every, 0)):
        if not isinstance(value, int) or value < least:
            shown = "null" if value is None else value
            raise UserError(f"trainer.{name} must be a whole number, at least {least}, not {shown}")
    settings = {
        # A run shorter than an interval is still logged and validated, at its end.
        "log_every_n_steps": min(every, steps),
        "strategy": strategy,
        "default_root_dir": experiment.values()["output_dir"],
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        **more,
    }
    _quiet()
    try:
        return build(experiment, "trainer", **settings)
    except _refusals() as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _spreads(trainer: dict[str, Any]) -> bool:
    return trainer.get("num_nodes", 1) != 1 or devices_per_node(trainer) > 1


def replicas(trainer: "pl.Trainer") -> int:
    """The number of shares of a batch; the devices of a pipeline have one in common."""
    from mhc_lightning.strategies.layout import layout_of

    return layout_of(trainer.strategy).data_parallel_size


def check_layout(
    trainer: "pl.Trainer", module: "LanguageModel", data: "TextDataModule | None" = None
) -> None:
    """Refuse what the strategy cannot run, before any process group is there.

    Args:
        trainer: The trainer, with its strategy.
        module: The module to run.
        data: The data to train on; None for other commands.

    Raises:
        UserError: the strategy cannot run the module, or its micro-batches.
    """
    from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy

    if isinstance(trainer.strategy, PipelineStrategy):
        trainer.strategy.check(module, None if data is None else data.micro_batch_size)
    elif isinstance(trainer.strategy, FullyShardedStrategy):
        trainer.strategy.check(module)


def build_data(experiment: Experiment, world_size: int) -> "TextDataModule":
    """The data module; a `micro_batch_size` of null becomes a process's whole share of the batch.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    data = experiment.config.data
    size, micro = data.batch_size, data.micro_batch_size
    if micro is not None and (not isinstance(micro, int) or isinstance(micro, bool)):
        raise UserError(f"data.micro_batch_size must be a whole number or null, not {micro!r}")
    if micro is None and isinstance(size, int):
        micro, rest = divmod(size, world_size)
        if rest or not micro:
            raise UserError(
                f"data.batch_size={size} cannot be shared evenly by {world_size} devices;"
                f" use a multiple of {world_size}"
            )
    return build(experiment, "data", micro_batch_size=micro)


def describe_token_data(data: "TextDataModule") -> None:
    """Say on standard error what data that `prepare` did not make were taken for."""
    from mhc_lightning.data import PreparedData

    if is_first_process():
        for source in data.sources:
            if not isinstance(source, PreparedData):
                print(f"{source.path} is taken for {source.description}", file=sys.stderr)


def build_model(experiment: Experiment, *, on_meta: bool = False) -> "LanguageModel":
    """The model with its optimizer recipe, initialised from the configuration's seed.

    Args:
        experiment: The experiment.
        on_meta: True to build the network without memory for its weights, if its class can: one
            that reads them from files cannot.
    """
    import lightning.pytorch as pl
    import torch

    from mhc_lightning import LanguageModel

    values = experiment.values()
    pl.seed_everything(values["seed"], workers=True, verbose=False)
    on_meta = on_meta and getattr(target_of(experiment, "model"), "builds_on_meta", True)
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        network = build(experiment, "model")
    return LanguageModel(
        network,
        build(experiment, "optimizer"),
        compile=values["compile"],
        recompute=values["recompute"],
    )


def build_model_for(experiment: Experiment, trainer: "pl.Trainer") -> "LanguageModel":
    """The model, on `meta` if the trainer's strategy allocates it part by part."""
    from mhc_lightning.strategies.layout import layout_of

    return build_model(experiment, on_meta=layout_of(trainer.strategy).materialises_module)


def count_optimizer_steps(
    trainer: "pl.Trainer", experiment: Experiment, data: "TextDataModule"
) -> None:
    """Make the trainer accumulate gradients over a batch, and validate by optimizer steps."""
    trainer.accumulate_grad_batches = data.accumulation(replicas(trainer))
    interval = min(experiment.config.trainer.val_check_interval, max(1, trainer.max_steps))
    trainer.val_check_interval = interval * trainer.accumulate_grad_batches


def _refusals() -> tuple[type[Exception], ...]:
    """The errors that Lightning's Trainer raises for settings that it refuses."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException, ValueError, TypeError, RuntimeError


def _quiet() -> None:
    """Hide Lightning's general messages; show a warning as one line."""
    import warnings

    import lightning.pytorch  # noqa: F401  (it sets the level that is set here)

    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers",
        ".*LeafSpec",
        "GPU available but not used",
        ".*returned a view tensor",  # nothing here writes to streams in place
        r".*self.log\('step', ..., sync_dist=True",  # it is the same everywhere
    ):
        warnings.filterwarnings("ignore", message=text)
    warnings.formatwarning = _one_line_warning  # Lightning has set one of its own


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
