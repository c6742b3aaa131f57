"""The Transformer: equality at initialisation, causality, variants, counts."""

import math
from typing import Any

import pytest
import torch
from networks import CONNECTIONS, DENSE, EXPERTS, scrambled, tiny_transformer
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, Transformer

VOCABULARY, WIDTH = 40, 16
MANIFOLD = ["mhc", "mhc_single_pass", "mhc_lite", "krom", "identity"]


def make(connection: str, **changes: Any) -> Transformer:
    """Three blocks, without experts by default."""
    return tiny_transformer(connection, **{"num_layers": 3, **DENSE, **changes})


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape)


@pytest.mark.parametrize("connection", ["hc", "hc_linear", "hc_static"])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_hyper_connections_start_exactly_as_the_baseline(connection: str, num_streams: int) -> None:
    tokens = tokens_of(2, 11)
    expected = make("residual")(tokens)
    assert torch.equal(make(connection, num_streams=num_streams)(tokens), expected)


@pytest.mark.parametrize("num_streams", [1, 2, 4])
@pytest.mark.parametrize("connection", MANIFOLD)
def test_manifold_hyper_connections_start_as_the_baseline(
    num_streams: int, connection: str
) -> None:
    """Equal in exact arithmetic: the difference is rounding, 1e-15 in float64 (README)."""
    tokens = tokens_of(2, 11)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        expected = make("residual").to(dtype)(tokens)
        actual = make(connection, num_streams=num_streams).to(dtype)(tokens)
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_every_parameter_learns(connection: str) -> None:
    model = make(connection, **EXPERTS)  # the first block is dense
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = tokens_of(4, 9)
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
    model = make("identity", **EXPERTS)
    if not plain_head:
        model.output = torch.nn.Linear(WIDTH, VOCABULARY)
    model.double()
    tokens, targets = tokens_of(2, 3, 16)
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
    with pytest.raises(UserError, match="targets must be from 0 to 39"):
        model.loss(tokens, tokens.new_full(tokens.shape, VOCABULARY), ignore_index=0)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_causal(connection: str) -> None:
    model = make(connection)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % VOCABULARY
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:8].max() == 0
    assert difference[8:].min() > 0


# Identity connections have no logits: tests/kernels covers them.
@pytest.mark.parametrize("connection", ["hc", "mhc", "mhc_single_pass", "mhc_lite"])
def test_kernels_and_fused_seams_give_the_same_gradients(
    connection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(1, 6)
    results = []
    for kernels in ("torch", "triton", "compiled"):
        monkeypatch.setenv("MHC_LIGHTNING_KERNELS", kernels)
        model = make(connection, num_layers=1)
        for module in model.modules():
            if isinstance(module, Connection):
                scrambled(module, 0.2)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss.detach(), grads))
    for loss, grads in results[1:]:
        assert torch.allclose(results[0][0], loss, rtol=1e-6)
        for name, expected in results[0][1].items():
            error = (grads[name] - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max() + 1e-9, name


@pytest.mark.slow  # dense ones: test_recompute.py
def test_compiled_experts_give_the_same_gradients() -> None:
    tokens = tokens_of(2, 9)
    results = []
    for compiled in (False, True):
        model = make("mhc", num_layers=2, **EXPERTS)
        if compiled:
            model.compile_sublayers()
        model(tokens).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9, name


def test_autocast_takes_the_streams_to_bfloat16_and_leaves_coefficients() -> None:
    model = make("mhc")
    seen = []
    for block in model.blocks:
        block.attention_connection.window.register_forward_hook(
            lambda module, args, out: seen.append((args[0].dtype, out.residual.dtype))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens_of(2, 9))
    assert set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_no_tokens(connection: str) -> None:
    model = make(connection, **EXPERTS)
    model.recompute_block_size = 3
    for shape in ((0, 9), (2, 0)):
        model.zero_grad()
        logits = model(torch.zeros(shape, dtype=torch.int64))
        assert logits.shape == (*shape, VOCABULARY)
        tokens = torch.zeros(shape, dtype=torch.int64)
        loss = model.loss(tokens, tokens)
        (logits.sum() + loss).backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
        assert model.token_losses(tokens, tokens).shape == shape


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_shapes_on_meta(connection: str) -> None:
    with torch.device("meta"):
        model = make(connection, **EXPERTS)
        tokens = tokens_of(2, 9)
    model.recompute_block_size = 3
    streams = model.embed(tokens)
    assert streams.is_meta and streams.shape == (2, 9, model.num_streams, WIDTH)
    assert model(tokens).shape == (2, 9, VOCABULARY)
    assert model.token_losses(tokens, tokens).shape == (2, 9)
    loss = model.loss(tokens, tokens)
    assert loss.is_meta and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    caches = model.new_caches(2, 9)
    for part in (tokens[:, :4], tokens[:, 4:]):
        assert model.forward_cached(part, caches).shape == (2, VOCABULARY)


def test_layer_indices_count_sublayers() -> None:
    model = make("mhc")
    indices = [m.layer_index for m in model.modules() if isinstance(m, Connection)]
    assert indices == list(range(6))
    assert make("residual").num_streams == 1
    assert make("hc", num_streams=3).num_streams == 3


def test_width_of_dense_blocks_among_experts() -> None:
    model = make("residual", num_dense_layers=1, **EXPERTS)
    assert model.blocks[0].feed_forward.body.down.in_features == 3 * 20
    assert model.blocks[1].feed_forward.body.gate_up.shape == (4, 16, 40)


def test_flops_per_token_of_a_dense_model() -> None:
    model = make("residual")
    attention_matrices = 16 * 2 * 12 + 16 * 12 + 8 * 2 * 16 + 16 * 16
    matrices = 3 * (attention_matrices + 3 * 16 * 20) + 16 * 40
    attention = 3 * 100 * 2 * (8 + 4 + 8)
    assert model.flops_per_token(100) == 6 * matrices + 3 * attention
    with_experts = make("residual", num_dense_layers=0, **EXPERTS)
    experts = 3 * (3 * 3 * 16 * 20 - 3 * 16 * 20 + 16 * 4)  # 2 active + 1 shared, and the router
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
        ({**EXPERTS, "num_expert_groups": 3}, "model.num_expert_groups must divide"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("mhc", **change)
