"""Old names of modules and classes: they still import, with a warning that names the new one."""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> new name, without the package's.
MOVED = {
    "callbacks.alarm_evidence": "callbacks.alarm.evidence",
    "callbacks.alarm_policy": "callbacks.alarm.policy",
    "callbacks.cadence": "callbacks.every_n_steps",
    "callbacks.compiled_regions": "callbacks.watching.compiled_regions",
    "callbacks.lineage": "callbacks.watching.lineage",
    "callbacks.observations": "callbacks.watching.observations",
    "callbacks.reporting": "loggers.trainer_loggers",
    "callbacks.robust_band": "callbacks.alarm.robust_band",
    "callbacks.stability_alarm": "callbacks.alarm.stability_alarm",
    "callbacks.update_guard": "callbacks.alarm.update_control",
    "callbacks.watcher": "callbacks.watching.stream_watcher",
    "checkpoint_folders": "checkpoints.reading",
    "checkpoint_names": "checkpoints.names",
    "checkpointing": "checkpoints.run_checkpoint",
    "cli.building": "cli.components",
    "cli.provenance": "cli.print_config",
    "data.assemble": "data.prepared_writing",
    "data.finding": "data.input_files",
    "data.forms": "data.file_formats",
    "data.hub": "data.hub_datasets",
    "data.loader": "data.batch_loader",
    "data.order": "data.shuffling",
    "data.pool": "data.worker_pool",
    "data.prepared": "data.prepared_data",
    "data.record": "data.prepared_record",
    "data.remote": "data.chunk_cache",
    "data.sequences": "data.training_sequences",
    "data.shard": "data.unit_tokenization",
    "data.units": "data.work_units",
    "data.validation": "data.validation_sequences",
    "evaluation.running": "evaluation.harness_tasks",
    "event_files": "loggers.event_files",
    "finiteness": "optimizers.finiteness",
    "interchange.exported": "interchange.exported_model",
    "interchange.tensor_names": "interchange.compatibility",
    "modules.plain": "modules.plain_projection",
    "modules.recompute_block": "modules.replay",
    "kernels.ends": "kernels.expand_mean",
    "kernels.reading": "kernels.read",
    "kernels.record": "kernels.mappings",
    "kernels.rule": "kernels.mappings",
    "kernels.seam": "kernels.merge_read",
    "kernels.toolchain": "kernels.triton_support.availability",
    "muon": "optimizers.muon",
    "optimization": "optimizers.recipes",
    "optimizer_names": "optimizers.parameter_names",
    "random_state": "checkpoints.random_state",
    "reporting.drawing": "plotting.theme",
    "reporting.facts": "reporting.run_description",
    "reporting.reading": "reporting.logged_runs",
    "reporting.record": "reporting.report_json",
    "reporting.series": "reporting.metric_series",
    "reporting.writing": "reporting.report_folder",
    "saved_checkpoints": "checkpoints.refusals",
    "strategies.backward_within_step": "strategies.optimization_loop",
    "strategies.engine_stage": "strategies.scheduled_stage",
    "strategies.launching": "strategies.launcher",
    "strategies.watched": "strategies.watched_strategy",
    "strategies.whole_files": "checkpoints.portable_strategy",
    "strategies.whole_state": "checkpoints.distributed_state",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` under their old names, if no other finder has found them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a moved module, or None."""
        package, _, name = fullname.partition(".")
        moved = package == __package__ and name in MOVED
        return ModuleSpec(fullname, self) if moved else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in place of the empty one, so that both are the same."""
        old = module.__name__
        new = f"{__package__}.{MOVED[old.removeprefix(f'{__package__}.')]}"
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def keep_old_names() -> None:
    """Let the old names of `MOVED` be imported."""
    sys.meta_path.append(_MovedModules())


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, for names that were renamed within the module.

    Args:
        module: The module's `__name__`.
        names: New names by old name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is now {module}.{names[name]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return find
