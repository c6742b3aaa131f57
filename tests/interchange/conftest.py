"""A small network with random weights, and its settings."""

import copy

import pytest
import torch

from mhc_lightning.interchange.model_settings import build_network, section_records

SETTINGS = {
    "_target_": "mhc_lightning.modules.Transformer",
    "connection": {
        "_target_": "mhc_lightning.modules.ManifoldHyperConnection",
        "_partial_": True,
        "sinkhorn_iterations": 20,
        "eps": 1e-20,
    },
    "vocab_size": 257,
    "dim": 16,
    "num_layers": 2,
    "num_streams": 4,
    "num_heads": 2,
    "head_dim": 8,
    "rope_dim": 4,
    "kv_rank": 8,
    "ffn_dim": 24,
    "init_std": 0.2,
}


@pytest.fixture
def settings():
    """The section `model` of a small network's configuration, with its connection."""
    return copy.deepcopy(SETTINGS)


@pytest.fixture
def network():
    """Builds a network from settings, with every tensor of it random."""

    def build(settings):
        model = build_network(section_records(settings), "the test")
        with torch.no_grad():
            for tensor in filter(torch.is_floating_point, model.state_dict().values()):
                tensor.add_(0.3 * torch.randn_like(tensor))
        return model.eval()

    return build
