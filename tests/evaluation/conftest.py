"""A small network over bytes, and tasks on local data."""

from functools import partial
from typing import Any

import pytest
import torch
from local_tasks import write_local_tasks

from mhc_lightning.data.token_classes import bind_tokenizer
from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.modules import (
    Engram,
    ManifoldHyperConnection,
    Memory,
    OverEncoding,
    Transformer,
)

MEMORIES: dict[str, Any] = {
    "no memory": Memory,
    "engram": partial(Engram, rows=97, num_heads=2, dim=8, zero_start=False),
    "over_encoding": partial(OverEncoding, rows=98, num_heads=2, dim=8),
}


@pytest.fixture(scope="session", params=MEMORIES)
def network(request):
    """A small random network over bytes, sure enough of itself for its choices to differ."""
    torch.manual_seed(3)
    model = Transformer(
        connection=partial(ManifoldHyperConnection), vocab_size=257, dim=24, num_layers=2,
        num_heads=2, head_dim=8, rope_dim=4, kv_rank=8, ffn_dim=32, init_std=0.5,
        memory=MEMORIES[request.param],
    )  # fmt: skip
    bind_tokenizer(model.memory, ByteTokenizer())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("phi", "table.weight", "conv.weight")):
                parameter.normal_()
    return model.eval()


@pytest.fixture(scope="session")
def direct(network):
    """Log-likelihood and greediness of a continuation: one sequence alone, without padding."""

    @torch.no_grad()
    def score(context, continuation):
        logits = network(torch.tensor([[*context, *continuation]]))[0].double()
        total, greedy = 0.0, True
        for place, token in enumerate(continuation, start=len(context)):
            total += float(logits[place - 1].log_softmax(-1)[token])
            greedy &= int(logits[place - 1].argmax()) == token
        return total, greedy

    return score


@pytest.fixture(scope="session")
def encode():
    return lambda text: [int(token) for token in ByteTokenizer().encode(text)]


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory):
    """A folder of tasks of the harness on local data, with the documents of its two splits."""
    folder = tmp_path_factory.mktemp("tasks, = {1}")
    return folder, *write_local_tasks(folder)
