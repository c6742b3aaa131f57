"""Small models of transformers with random weights."""

import pytest
from causal_lms import KINDS, tiny_causal_lm

from mhc_lightning.huggingface import MhcForCausalLM


@pytest.fixture(scope="session")
def build():
    """Builds a model, always the same, in evaluation mode; arguments are those of `tiny_config`."""
    return tiny_causal_lm


@pytest.fixture(params=KINDS)
def model(request, build) -> MhcForCausalLM:
    """A model of each kind."""
    connection, changes = KINDS[request.param]
    return build(connection, **changes)
