"""The settings of an optimizer whose state was loaded: the present ones replace the saved ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mhc_lightning.errors import UserError
from mhc_lightning.optimizers.recipes import MuonRecipe, OptimizerRecipe
from mhc_lightning.optimizers.schedule import follow_present_schedule


def check_kind(states: Sequence[Mapping[str, Any]] | None, recipe: OptimizerRecipe) -> None:
    """Compare the kind of a saved optimizer with that of the recipe of a run that resumes.

    Raises:
        UserError: One is Muon, and the other AdamW.
    """
    if not states:
        return
    saved, now = "muon" in states[0]["param_groups"][0], isinstance(recipe, MuonRecipe)
    if saved != now:
        names = {True: "Muon", False: "AdamW"}
        raise UserError(
            f"the checkpoint's optimizer is {names[saved]}, not {names[now]}; choose that one,"
            " or begin at step 0 with its weights: export it and give ckpt_path=FOLDER"
        )


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group of a new optimizer that has a scheduler."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def keep_present_settings(
    settings: Sequence[Mapping[str, Any]], optimizer: Optimizer, scheduler: LambdaLR
) -> dict[str, tuple[Any, Any]]:
    """Give an optimizer whose state was loaded the present settings in place of the saved ones.

    Groups that were added after `group_settings` keep their saved settings.

    Args:
        settings: The result of `group_settings` for the new optimizer.
        optimizer: The optimizer, with its state loaded.
        scheduler: The optimizer's scheduler, with its state loaded.

    Returns:
        The saved and the present value of each setting that differs, by name.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for group, present in zip(optimizer.param_groups, settings, strict=False):
        for name, value in present.items():
            saved = group.get(name)
            if saved != value:
                changed.setdefault("lr" if name == "initial_lr" else name, (saved, value))
                group[name] = value
    rates = follow_present_schedule(optimizer, scheduler, len(settings))
    if rates is not None and "lr" not in changed:
        changed["the next step's learning rate"] = rates
    return changed
