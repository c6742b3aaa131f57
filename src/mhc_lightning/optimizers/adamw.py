"""AdamW, with groups of tables whose touched rows alone are updated."""

from typing import Any

import torch

from mhc_lightning.optimizers.row_updates import ROWS, UpdatesRows


class RowAdamW(UpdatesRows, torch.optim.AdamW):
    """torch's AdamW; groups with `rows` hold tables: see `row_updates`."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        # `step` asks each group for what it has to update, once gradients are there.
        if not group.get(ROWS):
            return super()._init_group(group, *lists)
        self.update_rows(group)
        return False
