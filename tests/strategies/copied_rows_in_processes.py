"""Trains tables that every process has a copy of, in legs; started by torchrun, or alone."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import memory_in_processes as layouts
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from mhc_lightning.modules import NgramTable
from mhc_lightning.optimizers import AdamWRecipe, MuonRecipe

RECIPES = {"adamw": AdamWRecipe, "muon": MuonRecipe}


class Checked(layouts.Watched):
    def setup(self, stage: str) -> None:
        """The first process's rows have to reach the others."""
        super().setup(stage)
        if dist.is_initialized() and dist.get_rank() > 0 and self.trainer.ckpt_path is None:
            for table in (m for m in self.modules() if isinstance(m, NgramTable)):
                torch.nn.init.ones_(table.weight)

    def on_train_end(self) -> None:
        """Tables went by row gradients, and all copies are equal bit for bit."""
        (optimizer,) = self.trainer.optimizers
        for table in (m for m in self.modules() if isinstance(m, NgramTable)):
            weight = table.weight
            assert weight.grad is not None and weight.grad.is_sparse
            state = optimizer.row_states()[weight]
            assert 0 < len(state["rows"]) < len(weight)
            kept = [weight.detach(), *(tensor for _, tensor in state.items())]
            for tensor in kept if dist.is_initialized() else ():
                copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
                dist.all_gather(copies, tensor)
                assert all(torch.equal(copy, tensor) for copy in copies)


layouts.Watched = Checked
layouts.STRATEGIES["lightning_ddp"] = DDPStrategy


def main(legs: list[dict[str, Any]], output: Path) -> None:
    for leg in legs:
        recipe: Any = partial(
            RECIPES[leg.get("recipe", "adamw")], memory_update=leg.get("update", "adam")
        )
        layouts.AdamWRecipe = recipe
        layouts.run({"adam": True, "lr": 0.01, **leg}, output)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
