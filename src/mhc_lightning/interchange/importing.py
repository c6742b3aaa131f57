"""An exported model read into a network, or into a checkpoint that training starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mhc_lightning.interchange.exported_model import Exported, open_exported
from mhc_lightning.modules import Transformer

_PREFIX = "model."  # of the network within the LightningModule


def import_model(folder: str | Path, model: Transformer) -> Exported:
    """Copy the weights of an exported model into `model`.

    Raises:
        UserError: Names the tensors that are missing, unexpected or of another shape, or in what
            the memory differs.
    """
    exported = open_exported(folder)
    exported.check_memory(model.memory)
    model.load_state_dict(exported.tensors(model.state_dict()))
    return exported


def weights_checkpoint(
    exported: Exported, expected: Mapping[str, Tensor], *, new_memory: bool = False
) -> dict[str, Any]:
    """An exported model as a checkpoint of weights alone.

    The tensors are those of the file, bit for bit. There is no state of a run: training starts at
    step 0, with a new optimizer and at the beginning of the data.

    Args:
        exported: The exported model.
        expected: State dict of the LightningModule that will load it, on any device.
        new_memory: True to leave out the tensors of the module's memory, which the exported model
            does not have.

    Returns:
        `state_dict`, `global_step` (0), `tokenizer` (its fingerprint), `trained_steps` (the steps
        before the export) and `document_mask`.

    Raises:
        UserError: Names the tensors that are missing, unexpected or of another shape.
    """
    network = {name.removeprefix(_PREFIX): tensor for name, tensor in expected.items()}
    tensors = exported.tensors(network, new_memory=new_memory)
    return {
        "state_dict": {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()},
        "global_step": 0,
        "tokenizer": exported.tokenizer_record["fingerprint"],
        "trained_steps": exported.step,
        "document_mask": exported.document_mask,
    }
