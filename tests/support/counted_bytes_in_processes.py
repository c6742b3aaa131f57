"""One training pass in several gloo processes, whose collectives are counted.

Arguments: rank, processes, devices that share experts, folder. Writes bytes by kind to RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.strategies.expert_parallel import expert_mesh
from mhc_lightning.strategies.layout import ranks_of
from mhc_lightning.strategies.sharding import shard_parts

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "dim": 32,
    "num_layers": 3,
    "num_heads": 2,
    "head_dim": 16,
    "rope_dim": 8,
    "kv_rank": 16,
    "ffn_dim": 64,
    "num_experts": 8,
    "num_active_experts": 2,
    "num_shared_experts": 1,
}
SEQUENCES, LENGTH = 2, 16


def network() -> Transformer:
    """The same network in every process."""
    torch.manual_seed(0)
    return Transformer(connection=ManifoldHyperConnection, **SIZES)


class Called(nn.Module):
    """A network whose call is its loss: FSDP2 gathers when a module is called."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network.loss(tokens[:, :-1], tokens[:, 1:])


def main(rank: int, processes: int, spread: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    model = Called(network())
    mesh = init_device_mesh("cpu", (processes,))
    experts = expert_mesh("cpu", spread, ranks_of(processes, 1, spread)) if spread > 1 else None
    shard_parts(model, model.network.blocks, mesh, experts=experts)
    counted = {"gathered": 0.0, "reduced": 0.0, "rows": 0}

    def counting(name: str, kind: str, argument: int) -> None:
        """Count the whole of what a collective gathers or reduces, as a ring sends it."""
        run = getattr(dist, name)

        def counted_run(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            size = dist.get_world_size(group)
            names = ("output_tensor", "output", "input_tensor", "input")
            tensors = [a for a in (*args, *(kwargs.get(n) for n in names)) if torch.is_tensor(a)]
            counted[kind] += tensors[argument].nbytes * (size - 1) / size
            return run(*args, **kwargs)

        setattr(dist, name, counted_run)

    counting("all_gather_single", "gathered", 0)  # by these names FSDP2 calls them
    counting("reduce_scatter_single", "reduced", 1)
    exchange = dist.all_to_all_single

    def counted_exchange(output: Any, sent: Any, *args: Any, **kwargs: Any) -> Any:
        if sent.is_floating_point():  # not the numbers of rows
            counted["rows"] += sent.nbytes
        return exchange(output, sent, *args, **kwargs)

    setattr(dist, "all_to_all_single", counted_exchange)  # noqa: B010
    torch.manual_seed(rank)
    tokens = torch.randint(0, 128, (SEQUENCES, LENGTH + 1))
    model(tokens).backward()
    (folder / f"{rank}.json").write_text(json.dumps(counted))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, processes, spread = map(int, sys.argv[1:4])
    main(rank, processes, spread, Path(sys.argv[4]))
