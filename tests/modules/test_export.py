"""Networks exported once, for batches and sequences of any size."""

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from mhc_lightning.modules import HyperConnection, ManifoldHyperConnection, Transformer


@pytest.mark.parametrize("connection", [ManifoldHyperConnection, HyperConnection])
def test_batch_and_sequence_have_names(
    connection: type, tiny_transformer: Callable[..., Transformer]
) -> None:
    network = tiny_transformer(connection=connection, num_experts=0, num_layers=1).eval()
    sizes = ({0: Dim("batch"), 1: Dim("sequence")},)
    exported = torch.export.export(
        network, (torch.randint(0, 40, (2, 9)),), dynamic_shapes=sizes, strict=False
    ).module()
    for shape in ((2, 9), (5, 17), (3, 2)):
        tokens = torch.randint(0, 40, shape)
        assert torch.equal(exported(tokens), network(tokens))
