"""What Engram is timed against computes the same function, hashes included."""

import pytest
import torch
from torch import Tensor

from engram_peers import DemoEngram, DeviceEngram
from mhc_lightning.modules import Engram
from mhc_lightning.modules.memory.engram import EngramBlock

DIM, N = 16, 3


@pytest.mark.parametrize("kind", [DemoEngram, DeviceEngram])
def test_the_same_values_and_gradients(kind: type[DemoEngram]) -> None:
    memory = Engram(
        vocab_size=31,
        model_dim=DIM,
        num_layers=4,
        num_streams=N,
        norm_eps=torch.finfo(torch.float32).eps,
        rows=40,
        layers=[1],
        num_heads=2,
        bias=True,
    )
    ours = memory.block_memory(1)
    assert isinstance(ours, EngramBlock) and ours.conv is not None and memory.hash is not None
    multipliers = memory.hash.multipliers[0].numpy()
    theirs = kind(memory.hash.layout, multipliers, 0, DIM, N, ours.table.width)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.5)
        heads = ours.table.weight.view(memory.hash.layout.heads, -1, ours.table.width)
        used = [head[:rows] for head, rows in zip(heads, theirs.moduli, strict=True)]
        theirs.embedding.weight.copy_(torch.cat(used))
        keys, value = (ours.key.weight, ours.key.bias), (ours.value.weight, ours.value.bias)
        projections = [*zip(*(x.chunk(N) for x in keys), strict=True), value]
        if isinstance(theirs, DeviceEngram):
            theirs.projection.weight.copy_(torch.cat([weight for weight, _ in projections]))
            theirs.projection.bias.copy_(torch.cat([bias for _, bias in projections]))
        else:
            for linear, (weight, bias) in zip(
                [*theirs.keys, theirs.value], projections, strict=True
            ):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
        for norms, weight in (
            (theirs.key_norms, ours.gate.key_norm),
            (theirs.stream_norms, ours.gate.stream_norm),
            (theirs.conv_norms, ours.conv.norm),
        ):
            for norm, row in zip(norms, weight.view(N, DIM), strict=True):
                norm.weight.copy_(row)
        theirs.conv.weight.copy_(ours.conv.weight.view(N * DIM, 1, -1))
    tokens = torch.randint(0, 31, (2, 14))
    streams: list[Tensor] = [torch.randn(2, 14, N, DIM).requires_grad_()] * 2
    one, other = ours(streams[0], memory.recall(tokens)), theirs(streams[1], tokens)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(one)
    (ours_grad,) = torch.autograd.grad(one, streams[0], grad)
    (theirs_grad,) = torch.autograd.grad(other, streams[1], grad)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-3, atol=1e-3)
