"""AdamW, with groups of tables whose touched rows alone are updated."""

from collections.abc import Callable
from typing import Any

import torch

from mhc_lightning.optimizers.meshes import by_mesh
from mhc_lightning.optimizers.row_updates import ROWS, UpdatesRows


class RowAdamW(UpdatesRows, torch.optim.AdamW):
    """torch's AdamW; groups with `rows` hold tables: see `row_updates`.

    Parameters of a group may be sharded over several meshes, as experts and all else are.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": alike}
            for group in groups
            for alike in (by_mesh(group["params"]) if not group.get(ROWS) else [group["params"]])
        ]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        # `step` asks each group for what it has to update, once gradients are there.
        if not group.get(ROWS):
            return super()._init_group(group, *lists)
        self.update_rows(group)
        return False
