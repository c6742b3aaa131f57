"""The Transformer: equality at initialisation, causality, variants, counts."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    Connection,
    HyperConnection,
    IdentityHyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    PermutationHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
    Transformer,
)

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "dim": 32,
    "num_layers": 3,
    "num_heads": 2,
    "ffn_dim": 48,
    "head_dim": 16,
    "rope_dim": 8,
    "kv_rank": 12,
    "init_std": 0.05,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1}
VARIANTS = [
    ResidualConnection,
    HyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
    PermutationHyperConnection,
    KroneckerHyperConnection,
    IdentityHyperConnection,
]
STATIC_HC = functools.partial(HyperConnection, dynamic=False)


def make(connection: Callable[..., Connection], **changes: Any) -> Transformer:
    torch.manual_seed(7)
    return Transformer(connection=connection, **{**SMALL, **changes})


@pytest.mark.parametrize("connection", [HyperConnection, STATIC_HC])
@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_hyper_connections_start_exactly_as_the_baseline(
    connection: Callable[..., Connection], num_streams: int
) -> None:
    tokens = torch.randint(0, 50, (2, 11))
    expected = make(ResidualConnection)(tokens)
    assert torch.equal(make(connection, num_streams=num_streams)(tokens), expected)


@pytest.mark.parametrize(
    ("connection", "num_streams"),
    [
        (connection, n)
        for connection in VARIANTS[2:]
        for n in (1, 2, 3, 4, 8)
        if n <= 4 or connection is not PermutationHyperConnection
    ],
)
def test_manifold_hyper_connections_start_as_the_baseline(
    num_streams: int, connection: Callable[..., Connection]
) -> None:
    """Equal in exact arithmetic; what is left is rounding, 1e-15 in float64 (README)."""
    tokens = torch.randint(0, 50, (2, 11))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        expected = make(ResidualConnection).to(dtype)(tokens)
        actual = make(connection, num_streams=num_streams).to(dtype)(tokens)
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize("connection", VARIANTS)
def test_every_parameter_learns(
    connection: Callable[..., Connection], experts: dict[str, Any]
) -> None:
    model = make(connection, **experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 50, (4, 17))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all((p != before[name]).any() for name, p in model.named_parameters())


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_targets_change_neither_loss_nor_gradients(
    ignore_index: int, plain_head: bool
) -> None:
    model = make(VARIANTS[-1], **EXPERTS)
    if not plain_head:
        model.output = torch.nn.Linear(32, 50)
    model.double()
    tokens, targets = torch.randint(0, 50, (2, 3, 16))
    targets[0, 5:], targets[1, :4], targets[2] = ignore_index, ignore_index, ignore_index
    logits = model(tokens).transpose(1, 2)
    kept = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none"
    )
    expected = kept.sum() / (targets != ignore_index).sum()
    loss = model.loss(tokens, targets, ignore_index=ignore_index)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    each = model.token_losses(tokens, targets, ignore_index=ignore_index)
    assert (each - kept).abs().max() < 1e-12
    parameters = list(model.parameters())
    for ours, wanted in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert (ours - wanted).abs().max() < 1e-12
    nothing = model.loss(tokens, torch.full_like(tokens, -100))
    assert nothing == 0
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(nothing, parameters))
    with pytest.raises(UserError, match="targets must be from 0 to 49"):
        model.loss(tokens, tokens.new_full(tokens.shape, 50), ignore_index=0)


@pytest.mark.parametrize("connection", VARIANTS)
def test_causal(connection: Callable[..., Connection]) -> None:
    model = make(connection)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:8].max() == 0
    assert difference[8:].min() > 0


@pytest.mark.parametrize("connection", VARIANTS[1:-1])  # without logits: tests/kernels
def test_triton_kernels_and_fused_seams_give_the_same_gradients(
    connection: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 50, (2, 9))
    results = []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("MHC_LIGHTNING_KERNELS", kernels)
        model = make(connection)
        for module in model.modules():
            if isinstance(module, Connection):
                for parameter in module.parameters():
                    parameter.data.add_(0.2 * torch.randn_like(parameter))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss.detach(), grads))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, expected in results[0][1].items():
        error = (results[1][1][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-9, name


@pytest.mark.parametrize("experts", [{}, pytest.param(EXPERTS, marks=pytest.mark.slow)])
def test_compiled_sublayers_give_the_same_gradients(experts: dict[str, Any]) -> None:
    tokens = torch.randint(0, 50, (2, 9))
    results = []
    for compiled in (False, True):
        model = make(ManifoldHyperConnection, **experts)
        if compiled:
            model.compile_sublayers()
        model(tokens).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9, name


def test_autocast_takes_the_streams_to_bfloat16_and_leaves_coefficients() -> None:
    model = make(ManifoldHyperConnection)
    seen = []
    for block in model.blocks:
        block.attention_connection.window.register_forward_hook(
            lambda module, args, out: seen.append((args[0].dtype, out.residual.dtype))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randint(0, 50, (2, 9)))
    assert set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("recompute", [0, 3])
@pytest.mark.parametrize("connection", [*VARIANTS, STATIC_HC])
def test_no_tokens(connection: Callable[..., Connection], recompute: int) -> None:
    model = make(connection, **EXPERTS)
    model.recompute_block_size = recompute
    for shape in ((0, 9), (2, 0)):
        model.zero_grad()
        logits = model(torch.zeros(shape, dtype=torch.int64))
        assert logits.shape == (*shape, 50)
        tokens = torch.zeros(shape, dtype=torch.int64)
        loss = model.loss(tokens, tokens)
        (logits.sum() + loss).backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
        assert model.token_losses(tokens, tokens).shape == shape


@pytest.mark.parametrize("recompute", [0, 3])
@pytest.mark.parametrize("connection", [*VARIANTS, STATIC_HC])
def test_shapes_on_meta(connection: Callable[..., Connection], recompute: int) -> None:
    with torch.device("meta"):
        model = make(connection, **EXPERTS)
        tokens = torch.randint(0, 50, (2, 9))
    model.recompute_block_size = recompute
    streams = model.embed(tokens)
    assert streams.is_meta and streams.shape == (2, 9, model.num_streams, 32)
    assert model(tokens).shape == (2, 9, 50)
    assert model.token_losses(tokens, tokens).shape == (2, 9)
    loss = model.loss(tokens, tokens)
    assert loss.is_meta and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    caches = model.new_caches(2, 9)
    for part in (tokens[:, :4], tokens[:, 4:]):
        assert model.forward_cached(part, caches).shape == (2, 50)


def test_layer_indices_count_sublayers() -> None:
    model = make(ManifoldHyperConnection)
    indices = [m.layer_index for m in model.modules() if isinstance(m, Connection)]
    assert indices == list(range(6))
    assert make(ResidualConnection).num_streams == 1
    assert make(HyperConnection, num_streams=3).num_streams == 3


def test_width_of_dense_blocks_among_experts() -> None:
    model = make(ResidualConnection, num_dense_layers=1, **EXPERTS)
    assert model.blocks[0].feed_forward.body.down.in_features == 3 * 48
    assert model.blocks[1].feed_forward.body.gate_up.shape == (4, 32, 96)


def test_flops_per_token_of_a_dense_model() -> None:
    model = make(ResidualConnection)
    matrices = 3 * (32 * 2 * 24 + 32 * 20 + 12 * 2 * 32 + 32 * 32 + 3 * 32 * 48) + 32 * 50
    attention = 3 * 100 * 2 * (16 + 8 + 16)
    assert model.flops_per_token(100) == 6 * matrices + 3 * attention
    with_experts = make(ResidualConnection, num_dense_layers=0, **EXPERTS)
    experts = 3 * (3 * 3 * 32 * 48 - 3 * 32 * 48 + 32 * 4)  # 2 active + 1 shared, and the router
    assert with_experts.flops_per_token(100) == model.flops_per_token(100) + 6 * experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_streams": 0}, "model.num_streams must be at least 1, not 0"),
        ({"rope_dim": 3}, "model.rope_dim must be even"),
        ({"num_layers": 0}, "model.num_layers must be at least 1, not 0"),
        ({"vocab_size": 0}, "model.vocab_size must be at least 1, not 0"),
        ({"num_experts": -1}, "model.num_experts must be at least 0, not -1"),
        ({"num_shared_experts": -1}, "model.num_shared_experts must be at least 0, not -1"),
        ({"num_dense_layers": -1}, "model.num_dense_layers must be at least 0, not -1"),
        ({"rope_theta": 0.0}, "model.rope_theta must be at least 1, not 0"),
        ({"norm_eps": -1.0}, "model.norm_eps must be at least 0, not -1"),
        ({"bias_update_speed": math.nan}, "model.bias_update_speed must be at least 0, not nan"),
        ({**EXPERTS, "num_active_experts": 9}, "model.num_active_experts must be between"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(ManifoldHyperConnection, **change)
