"""Engram computes the paper's equations, and begins as the network without it."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from memory_reference import EngramWeights, engram, gate, gate_slope
from networks import CONNECTIONS, tiny_transformer
from ngram_reference import Spelling, multiply_xor, suffix
from torch import Tensor
from torch.func import functional_call

from mhc_lightning.modules import Engram
from mhc_lightning.modules.memory.engram import EngramBlock, EngramGate, default_blocks

V, C, LENGTH = 40, 12, 17
END = 5  # the token that ends documents


def small_memory(num_streams: int, **settings: Any) -> Engram:
    """A memory of block 1 with three orders of n-grams, bound to a vocabulary with classes."""
    given = {"rows": 30, "layers": [1], "orders": (2, 3), "num_heads": 2, "dim": 6, **settings}
    memory = Engram(
        vocab_size=V, model_dim=C, num_layers=3, num_streams=num_streams, norm_eps=1e-6, **given
    )
    memory.bind(np.arange(V) % 29, END)
    return memory


def block_of(memory: Engram, dtype: torch.dtype = torch.float64) -> EngramBlock:
    """Its part, with parameters that all matter."""
    block = memory.block_memory(1)
    assert isinstance(block, EngramBlock)
    block.to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(0.7 * drawn)
    return block


def of(tensor: Tensor, *shape: int) -> Any:
    return tensor.detach().double().numpy().reshape(shape)


def weights_of(block: EngramBlock) -> EngramWeights:
    n = block.num_streams
    conv, key, value = block.conv, block.key, block.value
    return EngramWeights(
        key=of(key.weight, n, C, -1),
        key_bias=np.zeros((n, C)) if key.bias is None else of(key.bias, n, C),
        value=of(value.weight, C, -1),
        value_bias=np.zeros(C) if value.bias is None else of(value.bias, C),
        key_norm=of(block.gate.key_norm, n, C),
        stream_norm=of(block.gate.stream_norm, n, C),
        conv=None if conv is None else of(conv.weight, n, C, -1),
        conv_norm=None if conv is None else of(conv.norm, n, C),
    )


def reference(memory: Engram, block: EngramBlock, tokens: Tensor, streams: Tensor) -> Tensor:
    """The output for tokens [B, S] and streams [B, S, n, C], hashed by the reference as well."""
    assert memory.hash is not None
    layout = memory.hash.layout
    spelling = Spelling(
        [token % 29 for token in range(V)] if memory.compress else range(V),
        END,
        END if memory.documents else None,
    )
    table = of(block.table.weight, layout.heads, layout.rows_per_head, -1)
    batch = []
    for text, x in zip(tokens.tolist(), streams, strict=True):
        rows = []
        for position in range(len(text)):
            found = []
            for head, modulus in enumerate(layout.moduli[0]):
                gram = suffix(spelling, text, position, layout.orders[head // layout.num_heads])
                value = multiply_xor(gram, memory.hash.multipliers[0].tolist())
                found.append(table[head, value % modulus])
            rows.append(np.concatenate(found))
        shaped = of(x, len(text), block.num_streams, C)
        batch.append(
            engram(shaped, np.stack(rows), weights_of(block), layout.longest, block.norm_eps)
        )
    return torch.from_numpy(np.stack(batch))


def inputs(num_streams: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (2, LENGTH))
    tokens[0, 6], tokens[1, 0] = END, END
    return tokens, torch.randn(2, LENGTH, num_streams, C, dtype=torch.float64)


FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {"bias": True, "zero_start": False, "documents": False},
    "no convolution": {"conv": False, "orders": (2, 3, 4), "bias": False},
    "short kernel": {"conv_kernel": 1, "compress": False},
    "long kernel, one order": {"conv_kernel": 6, "orders": (4,), "pad_token": END},
}
forms = pytest.mark.parametrize("form", FORMS)
both_widths = pytest.mark.parametrize("num_streams", [1, 4])


@forms
@both_widths
def test_values_are_the_references(form: str, num_streams: int) -> None:
    memory = small_memory(num_streams, **FORMS[form])
    tokens, streams = inputs(num_streams)
    recalled = memory.recall(tokens)
    block = block_of(memory)
    expected = reference(memory, block, tokens, streams)
    found = block(streams, recalled)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    # float32 has no more than its own rounding, of weights, streams and arithmetic.
    found = block_of(memory, torch.float32)(streams.float(), recalled)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@forms
@both_widths
def test_gradients_are_the_references_differences(form: str, num_streams: int) -> None:
    """Along one direction of each parameter, and of the streams, in float64."""
    memory = small_memory(num_streams, **FORMS[form])
    tokens, streams = inputs(num_streams)
    recalled = memory.recall(tokens)
    block = block_of(memory)
    streams.requires_grad_()
    weight = torch.randn(streams.shape, dtype=torch.float64)
    (block(streams, recalled) * weight).sum().backward()

    def difference(target: Tensor) -> tuple[float, float]:
        direction, values = torch.randn_like(target), target.detach().clone()
        step, sides = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                target.copy_(values + sign * step * direction)
            sides.append(float((reference(memory, block, tokens, streams) * weight).sum()))
        with torch.no_grad():
            target.copy_(values)
        assert target.grad is not None
        return float((target.grad * direction).sum()), (sides[0] - sides[1]) / (2 * step)

    for name, parameter in (*block.named_parameters(), ("streams", streams)):
        analytic, numeric = difference(parameter)
        assert abs(analytic - numeric) < 1e-6 * max(1, abs(numeric)), name
        assert numeric != 0, name


@both_widths
def test_gradients_pass_gradcheck(num_streams: int) -> None:
    memory = small_memory(num_streams, bias=True)
    tokens, streams = inputs(num_streams)
    recalled, block = memory.recall(tokens), block_of(memory)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def call(x: Tensor, *own: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, own, strict=True)), (x, recalled))

    operands = (streams.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(call, operands, fast_mode=True)


# The gate where its slope is steepest, and where it is flat.

SCORES = [0.0, 1e-9, -1e-9, 0.99e-6, -0.99e-6, 1.01e-6, -1.01e-6, 1e-4, -0.3, 2.0, -40.0]


@pytest.mark.parametrize("score", SCORES)
def test_the_gate_and_its_slope_at_any_score(score: float) -> None:
    """With streams and keys of ones the score is the weight of the norms times √C."""
    part = EngramGate(4, 1, 0.0).double()
    ones = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        part.key_norm.fill_(score / 2)
    _, gates = part(ones, ones)
    assert gates.item() == pytest.approx(gate(score), rel=1e-14)
    gates.sum().backward()
    assert part.key_norm.grad is not None
    # d score / d weight of one value is 1/2 each.
    slope = float(part.key_norm.grad.sum()) / 2
    assert slope == pytest.approx(gate_slope(score), rel=1e-9, abs=0)
    if abs(score) < 1e-6:
        assert slope == 0
    assert abs(slope) <= 125
    if score == 0:
        assert gates.item() == 0.5


def test_a_gate_stays_in_float32_under_autocast() -> None:
    memory = small_memory(4)
    tokens, streams = inputs(4)
    block = block_of(memory, torch.float32)
    seen: list[Tensor] = []
    block.gate.window.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        out = block(streams.bfloat16(), memory.recall(tokens))
    assert seen[0].dtype == torch.float32 and out.dtype == torch.bfloat16
    expected = reference(memory, block_of(memory), tokens, streams)
    assert (out.double() - expected).abs().max() < 2e-2 * expected.abs().max()


# In a network.


def network(connection: str, **settings: Any) -> Any:
    memory = partial(Engram, rows=20, **settings)
    return tiny_transformer(connection, num_layers=3, memory=memory)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_at_first_a_network_computes_what_it_does_without_memory(connection: str) -> None:
    plain = tiny_transformer(connection, num_layers=3)
    with_memory = network(connection, layers=[0, 1, 2])
    tokens = torch.randint(V, (2, 11))
    assert torch.equal(with_memory(tokens), plain(tokens))
    for name, value in plain.state_dict().items():
        assert torch.equal(with_memory.state_dict()[name], value), name
    started = network(connection, layers=[0, 1, 2], zero_start=False)
    assert not torch.equal(started(tokens), plain(tokens))


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_zero_values_do_not_keep_it_from_learning(connection: str) -> None:
    model = network(connection, layers=[0, 1, 2])
    tokens = torch.randint(V, (2, 12))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for block in model.blocks:
        assert isinstance(block.memory, EngramBlock)
        assert float(block.memory.value.weight.grad.abs().max()) > 0


def test_one_memory_reads_before_the_attention_of_its_blocks_alone() -> None:
    model = network("mhc", layers=[1], zero_start=False)
    assert [block.memory is not None for block in model.blocks] == [False, True, False]
    tokens = torch.randint(V, (1, 9))
    recalled = model.recall(tokens)
    assert list(recalled) == [1]
    streams, carry = model.blocks[0](model.embed(tokens, recalled), None, recalled=recalled)
    block = model.blocks[1]
    found, _ = block(streams, carry, recalled=recalled)
    part, block.memory = block.memory, None
    expected, _ = block(part(streams, recalled), carry)
    assert torch.equal(found, expected)
    unread, _ = block(streams, carry)
    assert not torch.equal(found, unread)


def test_default_blocks_are_the_papers() -> None:
    assert default_blocks(30) == [1, 14]
    assert default_blocks(12) == [1, 5]
    assert [default_blocks(k) for k in (1, 2, 3, 4)] == [[0], [0, 1], [0, 1], [1]]


def test_parameters_of_a_block_are_as_counted_by_hand() -> None:
    block = small_memory(4).block_memory(1)
    assert block is not None
    width = 2 * 6
    layout_rows = 4 * 64  # heads times rows per head, a multiple of 64
    expected = layout_rows * 3 + width * (4 + 1) * C + 2 * 4 * C + 4 * C * 4 + 4 * C
    assert sum(parameter.numel() for parameter in block.parameters()) == expected


@pytest.mark.parametrize("bias", [False, True])
def test_a_part_by_itself_has_rows_and_adds_nothing_at_first(bias: bool) -> None:
    memory = small_memory(4, rows=4001, bias=bias)
    block = memory.block_memory(1)
    assert isinstance(block, EngramBlock)
    assert block.table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    streams = torch.randn(2, 7, 4, C)
    recalled = memory.recall(torch.randint(V, (2, 7)))
    assert torch.equal(block(streams, recalled), streams)
    other = small_memory(4, rows=4001, zero_start=False).block_memory(1)
    assert other is not None and not torch.equal(other(streams, recalled), streams)
