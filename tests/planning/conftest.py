"""Small models in some variety, and what they really keep."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import CONNECTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch

DENSE: dict[str, Any] = {
    "vocab_size": 100,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 16,
    "rope_dim": 8,
    "kv_rank": 24,
    "ffn_dim": 40,
}
EXPERTS = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1}


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """Returns a function: a model with a connection, a precision and changed sizes."""

    def build(connection: str, precision: str = "32-true", **sizes: Any) -> Transformer:
        model = Transformer(connection=CONNECTIONS[connection], **{**DENSE, **sizes})
        return model.bfloat16() if precision == "bf16-true" else model

    return build


@pytest.fixture
def loss() -> Callable[..., torch.Tensor]:
    """Returns a function: the loss of random tokens, computed as a trainer would."""

    def loss(model: Transformer, sequences: int, length: int, precision: str) -> torch.Tensor:
        device = model.output.weight.device
        tokens = torch.randint(0, model.vocab_size, (sequences, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model.loss(tokens[:, :-1], tokens[:, 1:])

    return loss


@pytest.fixture
def training(loss: Callable[..., torch.Tensor]) -> Callable[..., Callable[[], None]]:
    """Returns a function that returns one: two optimizer steps, in the order of a trainer.

    The first makes the optimizer's state, and gradients for the second to find.
    """

    def training(
        model: Transformer, batch: MicroBatch, precision: str, micro_batches: int
    ) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def two_steps() -> None:
            for _ in range(2):
                for number in range(micro_batches):
                    value = loss(model, batch.sequences, batch.length, precision)
                    if number == 0:
                        optimizer.zero_grad()
                    value.backward()
                    del value
                optimizer.step()

        return two_steps

    return training


@pytest.fixture
def mesh(tmp_path):
    """One process on its own: sharding moves everything as it does with many."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def peak() -> Callable[[str, Callable[[], None]], int]:
    """Returns a function: the bytes allocated at the fullest moment of some work."""
    return _peak


def _peak(device: str, work: Callable[[], None]) -> int:
    """Bytes allocated at the fullest moment of `work`, above those before it."""
    if device == "cuda":
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # loads the library
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # garbage of earlier work, freed during this, would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most
