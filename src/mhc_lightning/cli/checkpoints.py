"""The checkpoint that a command means: found, checked for damage, and checked against the model.

`mhc_lightning.checkpoints.refusals` lists every reason for which a checkpoint is refused.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mhc_lightning.checkpoints.folder_index import is_checkpoint_folder
from mhc_lightning.checkpoints.names import BEST, LAST, candidates_for_last
from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.checkpoints.refusals import fault_in
from mhc_lightning.checkpoints.saved_memory import check_saved_memory, lacks_memory, memory_in
from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.cli.run_folder import holds_run, is_first_process
from mhc_lightning.errors import UserError
from mhc_lightning.files.run_layout import CHECKPOINTS, CONFIG
from mhc_lightning.interchange.compatibility import check_tensors
from mhc_lightning.interchange.exported_model import (
    check_settings,
    is_exported,
    open_exported,
)
from mhc_lightning.interchange.importing import weights_checkpoint
from mhc_lightning.interchange.model_settings import differing_settings, section_records

if TYPE_CHECKING:
    from torch import nn

    from mhc_lightning import LanguageModel


def find_checkpoint(experiment: Experiment) -> Path | None:
    """The sound checkpoint that `ckpt_path` means; if `last` is damaged, the one before.

    Returns:
        None if `ckpt_path` is null, or if it is `last` and the run has not saved any yet, or if it
        is `auto` and there is no checkpoint.

    Raises:
        UserError: There is none, or the one asked for is damaged.
    """
    values = experiment.values()
    asked, output_dir = values["ckpt_path"], Path(values["output_dir"])
    if asked is None:
        return None
    folder = output_dir / CHECKPOINTS
    if asked == "auto" and not candidates_for_last(folder):
        return None
    if asked in ("last", "auto"):
        return _newest_sound(folder, output_dir)
    path = folder / BEST if asked == "best" else Path(asked).expanduser()
    if not path.exists():
        hint = (
            " (checkpoint.keep_best=1 keeps one)" if asked == "best" else "; or use ckpt_path=last"
        )
        raise UserError(f"no checkpoint at {path}{hint}")
    if path.is_dir() and not is_checkpoint_folder(path):
        if is_exported(path):
            return path.resolve()
        raise UserError(
            f"{path} is no checkpoint; name one (step_…) in a run's checkpoints/, or use"
            " ckpt_path=last"
        )
    fault = fault_in(path)
    if fault:
        raise UserError(f"checkpoint {path} is {fault}; use another, or ckpt_path=last")
    return path.resolve()


def _newest_sound(folder: Path, output_dir: Path) -> Path | None:
    candidates, link = candidates_for_last(folder), folder / LAST
    faults: list[tuple[str, str]] = []
    if link.is_symlink() and not link.exists():
        faults.append((os.readlink(link), "missing"))
    elif link.exists() and not link.is_symlink():
        faults.append((str(link), "a copy instead of a link (rename it to step_…)"))
    for path in candidates:
        fault = fault_in(path)
        if fault is None:
            for name, reason in faults:
                print(f"warning: {name} is {reason}; using {path.name} instead", file=sys.stderr)
            return path
        faults.append((path.name, fault))
    if faults:
        listed = ", ".join(f"{name} is {reason}" for name, reason in faults)
        raise UserError(f"no sound checkpoint in {folder}: {listed}")
    if holds_run(output_dir):
        return None
    raise UserError(
        f"nothing to go on with: {output_dir} holds no run; leave out ckpt_path to start one, or"
        " use ckpt_path=auto, which does either"
    )


def require_checkpoint(experiment: Experiment) -> Path:
    """The file or folder that `ckpt_path` means, for commands that need one.

    Raises:
        UserError: As `find_checkpoint`, and if that finds none.
    """
    path = find_checkpoint(experiment)
    if path is None:
        raise UserError(
            f"the run in {experiment.values()['output_dir']} has no checkpoint yet"
            if experiment.values()["ckpt_path"]
            else "ckpt_path is missing: say ckpt_path=last, ckpt_path=best or a checkpoint"
        )
    return path


def load_fitting(
    path: Path,
    model: "nn.Module",
    experiment: Experiment,
    *,
    may_run_code: bool = True,
    may_add_memory: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint, or an exported folder, and refuse one that does not fit `model`.

    Args:
        path: The result of `require_checkpoint`.
        model: The model, on any device, with the network as `model`.
        experiment: The experiment.
        may_run_code: True to rebuild Python objects in a checkpoint of the experiment's own run,
            which can run code.
        may_add_memory: True to load an exported model without a memory into a network with one. The
            checkpoint then lacks the tensors of the memory.

    Raises:
        UserError: Names the tensors that differ, and their shapes in the file and in the model; or
            the setting in which an exported model or a memory differs.
    """
    memory = memory_in(model.get_submodule("model"))
    if is_exported(path):
        exported = open_exported(path)
        new_memory = may_add_memory and exported.memory is None and memory.hash is not None
        if not new_memory:
            exported.check_memory(memory)
        checkpoint = weights_checkpoint(exported, model.state_dict(), new_memory=new_memory)
        check_settings(exported, experiment.values()["model"], new_memory=new_memory)
        return checkpoint
    own = Path(experiment.values()["output_dir"]).resolve()
    trusted = may_run_code and path.resolve().is_relative_to(own)
    checkpoint = load_checkpoint(path, trusted=trusted)
    shapes = {name: saved.shape for name, saved in describe(checkpoint["state_dict"]).items()}
    hint = "use the settings it was trained with (config.yaml of its run)"
    new = memory.hash is not None and lacks_memory(checkpoint["state_dict"])
    more = "; to add a memory, export it, and begin by fit ckpt_path=FOLDER" if new else ""
    saved = checkpoint["state_dict"]
    check_saved_memory(memory, saved, f"checkpoint {path}", f"{hint}{more}")
    check_tensors(shapes, model.state_dict(), f"checkpoint {path}", hint)
    _warn_of_other_settings(path, experiment)
    return checkpoint


def _warn_of_other_settings(path: Path, experiment: Experiment) -> None:
    """Warn if a checkpoint's run has settings with which the same tensors compute something else.

    Examples are the base of RoPE and the number of Sinkhorn's iterations.
    """
    if path.parent.name != CHECKPOINTS or not is_first_process():
        return
    try:
        record = yaml.safe_load((path.parent.parent / CONFIG).read_text(encoding="utf-8"))
        saved = record["model"]
        changes = differing_settings(
            section_records(saved), section_records(experiment.values()["model"])
        )
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return  # a checkpoint without its run, or a model that is built in another way
    if changes:
        print(
            f"warning: {path} was trained as another model; it had {', '.join(changes)}",
            file=sys.stderr,
        )


def holds_weights_alone(checkpoint: dict[str, Any]) -> bool:
    """True if a loaded checkpoint is an imported model, from which training starts at step 0."""
    return "loops" not in checkpoint


def adds_memory(module: "LanguageModel", checkpoint: dict[str, Any]) -> bool:
    """True if a loaded checkpoint has no memory, and the model has one."""
    return memory_in(module.model).hash is not None and lacks_memory(checkpoint["state_dict"])


def trained_steps(checkpoint: dict[str, Any]) -> int:
    """Optimizer steps of a checkpoint's training, or of a model's training before its export."""
    return int(checkpoint.get("trained_steps", checkpoint["global_step"]))
