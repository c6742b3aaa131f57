"""The names of the parameters that an optimizer's saved state belongs to.

torch saves state by the positions of parameters. If a resumed run freezes or trains other
parameters, the positions shift. Moments would then go to the wrong parameter or, if its shape
differs, be read beyond their end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mhc_lightning.errors import UserError

NAMES = "names"  # key of a saved group: the names of its parameters
_SHOWN = 4  # names in a message


def keep_names(optimizer: Optimizer, module: nn.Module) -> Optimizer:
    """Make an optimizer save the names of its parameters, and load state for the same names only.

    State that was saved without names is loaded if its groups and shapes fit. Otherwise loading
    raises UserError, before anything changes.

    Args:
        optimizer: An optimizer of `module`'s parameters.
        module: The module that names them.

    Returns:
        `optimizer`. A copy of it (`deepcopy`, pickle) has torch's own behaviour.
    """

    def names(target: Optimizer) -> list[list[str]]:
        by_parameter = {parameter: name for name, parameter in module.named_parameters()}
        return [
            [by_parameter.get(p, "?") for p in group["params"]] for group in target.param_groups
        ]

    def add(target: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = zip(state["param_groups"], names(target), strict=True)
        return {**state, "param_groups": [{**group, NAMES: listed} for group, listed in groups]}

    def check(target: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        present, groups = names(target), state["param_groups"]
        check_names([group.get(NAMES) for group in groups], present)
        _check_shapes(target, state, present)
        plain = [{k: v for k, v in group.items() if k != NAMES} for group in groups]
        return {**state, "param_groups": plain}

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(check)
    return optimizer


def check_names(saved: Sequence[Sequence[str] | None], present: Sequence[Sequence[str]]) -> None:
    """Compare the parameters of a saved state with the parameters that load it.

    Args:
        saved: Names by group; None for a group saved without names.
        present: Names by group.

    Raises:
        UserError: They differ; the message names the differences.
    """
    if any(group is None for group in saved) or [list(group or ()) for group in saved] == [
        list(group) for group in present
    ]:
        return
    before = {name for group in saved for name in group or ()}
    now = {name for group in present for name in group}
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


def _refusal(difference: str) -> UserError:
    return UserError(
        f"the checkpoint's optimizer is of other parameters: {difference}; train the same ones, or"
        " begin at step 0 with its weights: export it and give ckpt_path=FOLDER"
    )


def _listed(names: Sequence[str]) -> str:
    hidden = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
