"""Strategies that cannot train a memory are refused with one line; all others take it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from networks import tiny_transformer

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram
from mhc_lightning.strategies import (
    DataParallelStrategy,
    FullyShardedStrategy,
    PipelineStrategy,
)
from mhc_lightning.strategies.placements import placement_of, require_placement


def network(placement: Any) -> Any:
    changes: dict[str, Any] = {}
    if placement is not None:
        changes = {"memory": partial(Engram, rows=50, dim=8, placement=placement)}
    return tiny_transformer(**changes)


def of_two_processes(kind: Any) -> Any:
    strategy = kind()
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: 2)
    return strategy


def test_a_placement_is_the_memorys() -> None:
    assert placement_of(network(None)) is None
    assert placement_of(network("sharded")) == "sharded"


@pytest.mark.parametrize("placement", ["device", "sharded", "host"])
@pytest.mark.parametrize("kind", [DataParallelStrategy, FullyShardedStrategy, PipelineStrategy])
def test_this_packages_strategies_take_all(placement: str, kind: Any) -> None:
    require_placement(network(placement), of_two_processes(kind))


@pytest.mark.parametrize("placement", [None, "device", "sharded", "host"])
def test_lightnings_own_take_what_they_can(placement: str | None) -> None:
    """Several processes; alone, a process holds all rows."""
    module = network(placement)
    require_placement(module, SingleDeviceStrategy(torch.device("cpu")))
    require_placement(module, DDPStrategy())
    if placement in (None, "device"):
        require_placement(module, of_two_processes(DDPStrategy))
    else:
        with pytest.raises(UserError, match=f"{placement} does not work with DDPStrategy; use"):
            require_placement(module, of_two_processes(DDPStrategy))
    for kind in (FSDPStrategy, ModelParallelStrategy):
        if placement is None:
            require_placement(module, of_two_processes(kind))
        else:
            with pytest.raises(UserError, match=f"{kind.__name__} cannot train a memory"):
                require_placement(module, of_two_processes(kind))
