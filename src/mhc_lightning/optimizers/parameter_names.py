"""Which parameters an optimizer's saved state belongs to, by name.

torch keeps state by the numbers of parameters. Where a parameter has been frozen, or trained, in
between, the numbers mean others: moments go to the wrong parameter, or, of another shape, are read
beyond their end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mhc_lightning.errors import UserError

NAMES = "names"  # of a saved group's parameters
_SHOWN = 4  # names in a message


def keep_names(optimizer: Optimizer, module: nn.Module) -> Optimizer:
    """Have an optimizer save the names of its parameters, and load what was saved for these alone.

    State that was saved without names is loaded if its groups and shapes fit. Loading raises
    UserError otherwise, before anything is changed.

    Args:
        optimizer: Of parameters of ``module``.
        module: What names them.

    Returns:
        ``optimizer``. A copy of it (``deepcopy``, pickle) does as torch's own again.
    """

    def names(own: Optimizer) -> list[list[str]]:
        known = {parameter: name for name, parameter in module.named_parameters()}
        return [[known.get(p, "?") for p in group["params"]] for group in own.param_groups]

    def add(own: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = zip(state["param_groups"], names(own), strict=True)
        return {**state, "param_groups": [{**group, NAMES: listed} for group, listed in groups]}

    def check(own: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        present, groups = names(own), state["param_groups"]
        check_names([group.get(NAMES) for group in groups], present)
        _check_shapes(own, state, present)
        plain = [{k: v for k, v in group.items() if k != NAMES} for group in groups]
        return {**state, "param_groups": plain}

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(check)
    return optimizer


def check_names(saved: Sequence[Sequence[str] | None], own: Sequence[Sequence[str]]) -> None:
    """Compare the parameters that a state was saved for with those that it is loaded for.

    Args:
        saved: Names by group; None where they were not saved.
        own: Names by group.

    Raises:
        UserError: They differ; says which.
    """
    if any(group is None for group in saved) or [list(group or ()) for group in saved] == [
        list(group) for group in own
    ]:
        return
    before = {name for group in saved for name in group or ()}
    now = {name for group in own for name in group}
    gone, new = sorted(before - now), sorted(now - before)
    faults = [f"{_listed(gone)}, which this run does not train"] if gone else []
    faults += [f"not {_listed(new)}, which this run trains"] if new else []
    raise _refusal("; ".join(faults) or "the same parameters in other groups")


def _check_shapes(
    optimizer: Optimizer, state: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> None:
    counts = len(state["param_groups"]), len(optimizer.param_groups)
    if counts[0] != counts[1]:
        raise _refusal(f"{counts[0]} groups of them, where this run trains {counts[1]}")
    groups = zip(state["param_groups"], optimizer.param_groups, names, strict=True)
    for saved, group, listed in groups:
        numbers = saved["params"]
        if len(numbers) != len(group["params"]):
            raise _refusal(
                f"{len(numbers)} parameters in a group for which this run trains {len(listed)}"
            )
        for number, parameter, name in zip(numbers, group["params"], listed, strict=True):
            for key, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise _refusal(
                        f"{key} {list(value.shape)} where this run trains {name}"
                        f" {list(parameter.shape)}"
                    )


def _refusal(what: str) -> UserError:
    return UserError(
        f"the checkpoint's optimizer is of other parameters: {what}; train the same ones, or begin"
        " at step 0 with its weights: export it and give ckpt_path=FOLDER"
    )


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
