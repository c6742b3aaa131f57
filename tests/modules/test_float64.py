"""A network of float64 computes in float64 throughout: derivatives, and every operator's result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import CONNECTIONS, MEMORIES
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_lightning.evaluation.scoring import score_continuations
from mhc_lightning.generation import generate
from mhc_lightning.modules import (
    LatentAttention,
    MixtureOfExperts,
    SwiGLU,
    Transformer,
)
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.rotary import rotary_angles

PARTS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: LatentAttention(6, 2, 4, 2, 3),
    "attention_without_position": lambda: LatentAttention(6, 2, 4, 0, 3),
    "swiglu": lambda: SwiGLU(6, 4),
    "experts": lambda: MixtureOfExperts(6, 4, 4, 2, 1),
    "norm": lambda: RMSNorm(6, eps=1e-20),
}
TOKENS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def at_work(module: nn.Module) -> nn.Module:
    """In float64, with parameters that all matter."""
    torch.manual_seed(0)
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def is_right(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether the gradients of a module's parameters and inputs are those of differences."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(*operands: Tensor) -> Tensor:
        own, rest = operands[: len(names)], operands[len(names) :]
        return functional_call(module, dict(zip(names, own, strict=True)), rest)

    return gradcheck(call, (*parameters, *inputs), fast_mode=True)


@pytest.mark.parametrize("part", PARTS)
def test_gradients_of_parts(part: str) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert is_right(at_work(PARTS[part]()), x)


@pytest.mark.parametrize("connection", list(CONNECTIONS)[1:])
def test_gradients_of_connections(connection: str) -> None:
    module = at_work(CONNECTIONS[connection](dim=3, num_streams=4, layer_index=0))

    class Connected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.connection = module
            self.sublayer = at_work(nn.Linear(3, 3))

        def forward(self, streams: Tensor) -> Tensor:
            return self.connection(streams, self.sublayer)

    streams = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert is_right(Connected(), streams)


@pytest.mark.parametrize("connection", ["residual", "hc", "mhc", "mhc_single_pass", "mhc_lite"])
def test_gradients_of_networks(
    connection: str, tiny_transformer: Callable[..., Transformer]
) -> None:
    model = tiny_transformer(connection=CONNECTIONS[connection])
    at_work(model)
    model.recompute_block_size = 3

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.loss(TOKENS, TOKENS.flip(1))

    assert is_right(Loss())


class Widths(TorchDispatchMode):
    """Collects operators that return floating-point numbers of fewer than 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype in (
                *(torch.float32, torch.bfloat16, torch.float16),
            ):
                self.narrow.add(str(func))
        return out


@pytest.mark.parametrize(
    ("connection", "memory"),
    [
        *((connection, None) for connection in CONNECTIONS),
        *(("mhc", memory) for memory in MEMORIES),
    ],
)
def test_no_operator_returns_less(
    connection: str, memory: str | None, tiny_transformer: Callable[..., Transformer]
) -> None:
    more = {} if memory is None else {"memory": MEMORIES[memory]}
    model = tiny_transformer(connection=CONNECTIONS[connection], **more)
    at_work(model)
    with Widths() as seen:
        model.loss(TOKENS, TOKENS.flip(1)).backward()
        model.token_losses(TOKENS, TOKENS.flip(1))
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance.update()
        list(generate(model.eval(), [1, 2, 3], max_new_tokens=3, temperature=0.7, seed=0))
        score_continuations(model, [([1, 2], [3, 4])], batch_size=1, max_length=8)
    assert not seen.narrow


def test_angles() -> None:
    positions = torch.tensor([0, 1, 1000, 100_000])
    cos, sin = rotary_angles(positions, 6, 500.0, torch.float64)
    for row, position in enumerate(positions.tolist()):
        for k in range(6):
            angle = torch.tensor(position * 500.0 ** (-2 * (k % 3) / 6), dtype=torch.float64)
            assert abs(cos[row, k] - angle.cos()) < 1e-9
            assert abs(sin[row, k] - angle.sin()) < 1e-9
