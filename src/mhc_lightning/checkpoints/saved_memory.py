"""The memory of a network within the saved tensors of a LightningModule: found, checked, loaded."""

from collections.abc import Mapping

from torch import Tensor, nn

from mhc_lightning.checkpoints.saved_tensors import below, describe, load_weights
from mhc_lightning.modules import Memory
from mhc_lightning.modules.memory.stored import (
    MEMORY,
    belongs_to_memory,
    check_memory,
    has_memory,
)

NETWORK = "model."  # before the names of the network's tensors within a LightningModule's


def memory_in(network: nn.Module) -> Memory:
    """A network's memory; one that recalls nothing if the network knows of none."""
    memory = getattr(network, "memory", None)
    return memory if isinstance(memory, Memory) else Memory()


def memory_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `check_memory` needs of a network's saved tensors: values of the constants alone.

    The other tensors of the memory are as `describe` gives them.
    """
    return {
        name: tensors[name] if name.startswith(MEMORY) else like
        for name, like in describe(tensors).items()
        if belongs_to_memory(name)
    }


def lacks_memory(weights: Mapping[str, Tensor]) -> bool:
    """True if the saved tensors of a LightningModule are those of a network without a memory."""
    return not has_memory(memory_of(below(weights, NETWORK)))


def check_saved_memory(
    memory: Memory, weights: Mapping[str, Tensor], source: str, hint: str = ""
) -> None:
    """`check_memory` of the saved tensors of a LightningModule.

    Raises:
        UserError: Names what differs.
    """
    check_memory(memory, memory_of(below(weights, NETWORK)), source, hint)


def load_beside_memory(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_weights` of a LightningModule; a memory that the weights lack keeps its values."""
    lacks = lacks_memory(weights)
    load_weights(
        module, weights, lambda name: lacks and belongs_to_memory(name.removeprefix(NETWORK))
    )
