"""The contract of all connections, and the guarantees of each kind."""

import math
from collections.abc import Callable

import pytest
import torch
from networks import CONNECTIONS
from torch import Tensor, nn

from mhc_lightning import modules
from mhc_lightning.errors import UserError
from mhc_lightning.kernels import StreamMappings, merge_streams, stream_mappings
from mhc_lightning.modules import (
    Connection,
    GatedHyperConnection,
    HyperConnection,
    IdentityHyperConnection,
    KroneckerHyperConnection,
    ManifoldHyperConnection,
    MappingsWindow,
    PermutationHyperConnection,
    ResidualConnection,
    SinglePassHyperConnection,
    Unmerged,
)

STATIC_HC = CONNECTIONS["hc_static"]
GATED = [
    ManifoldHyperConnection,
    PermutationHyperConnection,
    KroneckerHyperConnection,
    IdentityHyperConnection,
]
# Single-pass connections read with a carry: they have tests of their own.
ALL = [build for name, build in CONNECTIONS.items() if name != "mhc_single_pass"]
# Numbers of streams that a connection takes, where it does not take all.
Build = Callable[..., Connection]
ALLOWED: dict[Build, list[int]] = {PermutationHyperConnection: [1, 2, 3, 4]}


def scrambled(build: Build, **kwargs: int) -> Connection:
    """A connection away from its initialisation."""
    connection = build(**kwargs)
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return connection


@pytest.mark.parametrize(
    ("build", "n"), [(b, n) for b in ALL for n in ALLOWED.get(b, [1, 2, 3, 4, 8])]
)
def test_call_is_the_update_equation(build: Build, n: int) -> None:
    connection = scrambled(build, dim=16, num_streams=n, layer_index=3).double()
    n = connection.num_streams
    streams = torch.randn(2, 5, n, 16, dtype=torch.float64)
    pre, post, residual = connection.mappings(streams)
    assert pre.shape == post.shape == (2, 5, n)
    assert residual.shape == (2, 5, n, n)
    output = torch.sin((pre[..., None] * streams).sum(-2))
    expected = residual @ streams + post[..., None] * output[..., None, :]
    assert (connection(streams, torch.sin) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("build", ALL)
def test_read_and_write_compose_to_the_call(build: Build) -> None:
    connection = scrambled(build, dim=8, num_streams=4, layer_index=1)
    streams = torch.randn(3, connection.num_streams, 8)
    u, state = connection.read(streams)
    merged, carry = connection.write(streams, u.tanh(), state)
    assert carry is None
    assert torch.equal(merged, connection(streams, torch.tanh))


# All nine, one connection at a time: the composition table (docs/composition.md).
@pytest.mark.parametrize(
    ("build", "kernels"),
    [
        (ManifoldHyperConnection, "torch"),
        (ManifoldHyperConnection, "triton"),
        (ManifoldHyperConnection, "compiled"),
        (SinglePassHyperConnection, "triton"),
        (PermutationHyperConnection, "triton"),
        (HyperConnection, "triton"),
    ],
)
def test_a_chain_compiles_without_a_break(
    build: Build, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", kernels)
    torch.compiler.reset()  # what was compiled for the other connections counts against a limit
    chain = [scrambled(build, dim=8, num_streams=2, layer_index=k) for k in range(2)]
    streams = torch.randn(3, chain[0].num_streams, 8, requires_grad=True)

    def run(streams: Tensor) -> Tensor:
        between = chain[0].run(streams, torch.tanh)
        return chain[1].run(between, torch.tanh).merge()[0]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        merged = function(streams)
        results.append((merged, *torch.autograd.grad(merged.square().sum(), streams)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("build", ALL)
def test_the_window_shows_the_mappings_in_use(build: Build) -> None:
    connection = scrambled(build, dim=8, num_streams=4, layer_index=1)
    seen: list[tuple[Tensor, StreamMappings]] = []
    windows = [m for m in connection.modules() if isinstance(m, MappingsWindow)]
    assert len(windows) == 1
    windows[0].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    streams = torch.randn(3, connection.num_streams, 8)
    connection(streams, torch.tanh)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], streams)
    for shown, expected in zip(seen[0][1], connection.mappings(streams), strict=True):
        assert torch.equal(shown, expected)


@pytest.mark.parametrize("build", ALL[1:])
def test_parameters_stay_float32(build: Build) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.connection = scrambled(build, dim=8, num_streams=4, layer_index=0)
            self.linear = nn.Linear(8, 8)

        def forward(self, streams: Tensor) -> Tensor:
            return self.connection(streams, self.linear)

    for cast in ("half", "bfloat16"):
        model = Model()
        before = {name: p.clone() for name, p in model.connection.named_parameters()}
        getattr(model, cast)()
        assert model.linear.weight.dtype.itemsize == 2
        for name, parameter in model.connection.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])
        out = model(torch.randn(2, 4, 8).to(model.linear.weight.dtype))
        assert out.dtype == model.linear.weight.dtype
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.connection.parameters())
        model.to(dtype=torch.bfloat16)
        assert {p.dtype for p in model.connection.parameters()} == {torch.float32}
        model.double()
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model(torch.randn(2, 4, 8, dtype=torch.float64)).dtype == torch.float64


def test_parameters_are_float32_under_a_lower_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        connection = ManifoldHyperConnection(8, 4, 0)
        assert {p.dtype for p in connection.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dim() for p in connection.parameters()} <= {1, 2}


def test_contract_of_the_manifold_connection() -> None:
    connection = ManifoldHyperConnection(
        dim=6, num_streams=3, layer_index=4, sinkhorn_iterations=7, eps=1e-6
    )
    assert connection.phi.shape == (18, 15)
    assert connection.alpha.shape == (3,)
    assert connection.bias.shape == (15,)
    assert torch.equal(connection.alpha, torch.full((3,), 0.01))
    streams = torch.randn(2, 3, 6)
    expected = stream_mappings(streams, connection.phi, connection.alpha, connection.bias, 7, 1e-6)
    for a, b in zip(connection.mappings(streams), expected, strict=True):
        assert torch.equal(a, b)
    assert modules.StreamMappings is StreamMappings


def test_manifold_gains() -> None:
    """Forward gain one exactly, backward at most n, whatever the parameters (facts A1, G4)."""
    product = torch.eye(4)
    for index in range(40):
        connection = ManifoldHyperConnection(16, 4, index)
        with torch.no_grad():
            for parameter in connection.parameters():
                parameter.copy_(3 * torch.randn_like(parameter))
        residual = connection.mappings(torch.randn(32, 4, 16)).residual
        assert (residual >= 0).all()
        product = residual @ product
    assert (product.sum(-1) - 1).abs().max() < 1e-5
    assert product.sum(-2).max() <= 4 + 1e-4


@pytest.mark.parametrize("build", GATED)
def test_gated_connections_start_as_the_residual_one(build: Build) -> None:
    """Equal streams stay equal and get the plain residual update; reads differ only in scale."""
    x = torch.randn(7, 16)
    streams = x[:, None].expand(7, 4, 16)
    expected = x + torch.sin(x / x.norm(dim=-1, keepdim=True))
    for layer_index in (0, 5):  # sub-layer k reads stream k mod 4
        connection = build(dim=16, num_streams=4, layer_index=layer_index)
        new = connection(streams, lambda u: torch.sin(u / u.norm(dim=-1, keepdim=True)))
        assert (new - expected[:, None]).abs().max() < 1e-6
        pre = connection.mappings(streams).pre
        assert (pre.argmax(-1) == layer_index % 4).all()


def test_single_pass_reads_with_what_the_sub_layer_before_computed() -> None:
    """X_{l+1} = B_l X_l + C_l F(A_{l-1} X_l); the first read is of stream 0 (2609.19969)."""
    n, width = 3, 16
    connections = [
        scrambled(SinglePassHyperConnection, dim=width, num_streams=n, layer_index=k).double()
        for k in range(3)
    ]
    streams = torch.randn(2, 5, n, width, dtype=torch.float64)
    expected = streams
    weights = torch.eye(n, dtype=torch.float64)[0].expand(2, 5, n)
    for connection in connections:
        pre, post, residual = connection.mappings(expected)
        output = torch.sin((weights[..., None] * expected).sum(-2))
        expected = residual @ expected + post[..., None] * output[..., None, :]
        weights = pre

    u, state = connections[0].read(streams)
    unmerged = Unmerged(connections[0], streams, torch.sin(u), state)
    for connection in connections[1:]:
        merged, u, state = connection.follow(unmerged)
        unmerged = Unmerged(connection, merged, torch.sin(u), state)
    actual, carry = unmerged.merge()
    assert carry is not None
    assert (actual - expected).abs().max() < 1e-12
    assert (carry - weights).abs().max() < 1e-12


def test_a_single_pass_connection_without_its_carry() -> None:
    connection = SinglePassHyperConnection(16, 4, layer_index=2)
    with pytest.raises(ValueError, match=r"sub-layer 2 .* needs the carry"):
        connection(torch.randn(3, 4, 16), torch.sin)


@pytest.mark.parametrize("build", GATED)
def test_gated_initialisation_breaks_the_symmetry(build: Build) -> None:
    """After one gradient step the streams of one token differ."""
    connections = nn.ModuleList(build(dim=16, num_streams=4, layer_index=k) for k in range(6))
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def run() -> Tensor:
        streams = torch.linspace(-1, 1, 16).expand(1, 4, 16)
        for connection, layer in zip(connections, layers, strict=True):
            streams = connection(streams, layer)
        return streams

    optimizer = torch.optim.SGD([*connections.parameters(), *layers.parameters()], lr=0.1)
    first = run()
    assert (first - first.mean(1, keepdim=True)).abs().max() < 1e-6
    first.mean(1).square().sum().backward()
    optimizer.step()
    second = run()
    assert (second - second.mean(1, keepdim=True)).abs().max() > 1e-4


@pytest.mark.parametrize("build", [HyperConnection, STATIC_HC])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_hyper_connection_starts_as_the_residual_connection(build: Build, n: int) -> None:
    x = torch.randn(7, 16)
    streams = x[:, None].expand(7, n, 16)
    for layer_index in (0, 5):
        new = build(dim=16, num_streams=n, layer_index=layer_index)(streams, torch.sin)
        assert torch.equal(new, (x + x.sin())[:, None].expand(7, n, 16))


def test_parameter_counts() -> None:
    """2·blocks·(C(n+2) + n(n+2) + 2) for dynamic HC; (n²+2n)(nC+1) + 3 for mHC."""

    def count(connection: Connection) -> int:
        return sum(p.numel() for p in connection.parameters())

    # OLMo-1B, width 2048, 16 blocks (arXiv 2409.19606): 394,048 dynamic, 768 static.
    assert 32 * count(HyperConnection(2048, 4, 0)) == 394_048
    assert 32 * count(STATIC_HC(2048, 4, 0)) == 768
    assert count(ManifoldHyperConnection(2560, 4, 0)) == 24 * 4 * 2560 + 24 + 3
    assert count(ResidualConnection(2560)) == 0


def test_residual_connection_always_has_one_stream() -> None:
    connection = ResidualConnection(8, 4, 2)
    assert connection.num_streams == 1
    mappings = connection.mappings(torch.randn(3, 5, 1, 8).bfloat16())
    for mapping, shape in zip(mappings, [(3, 5, 1), (3, 5, 1), (3, 5, 1, 1)], strict=True):
        assert mapping.shape == shape
        assert mapping.dtype == torch.float32
        assert (mapping == 1).all()
    with pytest.raises(ValueError, match=r"takes streams \[\.\.\., 1, C\], not \[2, 4, 8\]"):
        connection(torch.randn(2, 4, 8), torch.tanh)


@pytest.mark.parametrize("build", ALL[1:])
def test_arguments_out_of_range(build: Build) -> None:
    for bad in ({"num_streams": 0}, {"num_streams": -1}, {"dim": 0}, {"layer_index": -1}):
        with pytest.raises(UserError, match=next(iter(bad))):
            build(**{"dim": 8, "num_streams": 4, "layer_index": 0, **bad})


def test_sinkhorn_iterations_out_of_range() -> None:
    with pytest.raises(UserError, match="sinkhorn_iterations must be at least 1, not 0"):
        ManifoldHyperConnection(8, 4, 0, sinkhorn_iterations=0)


def test_manifold_connection_against_transformers() -> None:
    """DeepSeek-V4's module on the same weights: its matrix is transposed, its epsilons are ours."""
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    def flip(rows: Tensor) -> Tensor:
        """Transpose the 4 x 4 mixing coefficients of [24, ...]; the first 8 stay."""
        mixing = rows[8:].unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)
        return torch.cat([rows[:8], mixing])

    for hc_eps, tolerance in ((0.0, 2e-6), (1e-6, 1e-4)):
        config = DeepseekV4Config(
            hidden_size=64, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=hc_eps, rms_norm_eps=1e-6
        )
        theirs = DeepseekV4HyperConnection(config)
        ours = ManifoldHyperConnection(64, 4, 0, eps=1e-6)
        with torch.no_grad():
            theirs.fn.normal_(std=1 / 16)
            theirs.base.normal_()
            theirs.scale.uniform_(0.5, 1.5)
            ours.phi.copy_(flip(theirs.fn).t())
            ours.bias.copy_(flip(theirs.base))
            ours.alpha.copy_(theirs.scale)
        streams = torch.randn(2, 9, 4, 64, requires_grad=True)
        post, comb, collapsed = theirs(streams)
        mappings = ours.mappings(streams)
        assert (mappings.post - post).abs().max() < tolerance
        assert (mappings.residual - comb.mT).abs().max() < tolerance
        u, _ = ours.read(streams)
        assert (u - collapsed).abs().max() < 10 * tolerance

        weights = torch.randn(2, 9, 4, 64)
        output = collapsed.sin()
        new = post[..., None] * output[..., None, :] + comb.mT @ streams
        ours_new = ours(streams, torch.sin)
        assert (ours_new - new).abs().max() < 10 * tolerance
        expected = torch.autograd.grad(
            new, [streams, theirs.fn, theirs.base, theirs.scale], weights
        )
        actual = torch.autograd.grad(ours_new, [streams, ours.phi, ours.bias, ours.alpha], weights)
        ours_all = (actual[0], flip(actual[1].t()), flip(actual[2]), actual[3])
        for a, b in zip(ours_all, expected, strict=True):
            assert (a - b).abs().max() <= 50 * tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("tanh", [True, False])
def test_hyper_connection_against_hyper_connections(tanh: bool) -> None:
    """The package hyper-connections on copied weights; it stores A_r, our residual transposed."""
    from hyper_connections import HyperConnections

    n, dim = 4, 32
    theirs = HyperConnections(n, dim=dim, layer_index=1, tanh=tanh, branch=nn.Linear(dim, dim))
    ours = HyperConnection(dim, n, 1, tanh=tanh)
    static = torch.cat([theirs.static_alpha[:, 0], theirs.static_beta, torch.eye(n).flatten()])
    assert torch.equal(ours.bias, static), "both start as their paper says"
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        norm_weight = (theirs.norm.gamma + 1)[:, None]
        assert ours.phi is not None and ours.alpha is not None
        ours.phi[:, :1] = norm_weight * theirs.dynamic_alpha_fn[:, :1]
        ours.phi[:, 1:2] = norm_weight * theirs.dynamic_beta_fn[:, None]
        ours.phi[:, 2:] = norm_weight * theirs.dynamic_alpha_fn[:, 1:]
        ours.alpha.copy_(torch.stack([theirs.dynamic_alpha_scale, theirs.dynamic_beta_scale]))
        ours.bias.copy_(
            torch.cat(
                [
                    theirs.static_alpha[:, 0],
                    theirs.static_beta,
                    theirs.static_alpha[:, 1:].t().flatten(),
                ]
            )
        )
    streams = torch.randn(2, 7, n, dim)
    flat = streams.permute(0, 2, 1, 3).reshape(2 * n, 7, dim)  # their layout: (batch streams) ...
    expected = theirs(flat).reshape(2, n, 7, dim).permute(0, 2, 1, 3)
    assert (ours(streams, theirs.branch) - expected).abs().max() < 2e-5 * math.sqrt(dim)


def test_a_new_variant_is_one_class() -> None:
    """mappings() is all that a variant adds, or mix() if it has the gates of mHC."""

    class Mean(Connection):
        def mappings(self, streams: Tensor) -> StreamMappings:
            n = self.num_streams
            ones = streams.new_ones(*streams.shape[:-1])
            return StreamMappings(ones / n, ones, torch.eye(n).expand(*ones.shape, n))

    streams = torch.randn(2, 3, 4, 8)
    mean = streams.mean(-2).sin()
    expected = merge_streams(streams, mean, torch.eye(4).expand(2, 3, 4, 4), torch.ones(2, 3, 4))
    assert (Mean(8, 4, 0)(streams, torch.sin) - expected).abs().max() < 1e-6
    assert Mean.replays

    class Rotation(GatedHyperConnection):
        def __init__(self, dim: int, num_streams: int, layer_index: int) -> None:
            super().__init__(dim, num_streams, layer_index, mix_bias=[0.5])

        def mix(self, logits: Tensor) -> Tensor:
            c, s = logits.cos(), logits.sin()
            return torch.stack([torch.cat([c, -s], -1), torch.cat([s, c], -1)], -2)

    residual = Rotation(8, 2, 0).mappings(streams[:, :, :2]).residual
    assert (residual.det() - 1).abs().max() < 1e-6
    assert (residual[..., 1, 0] - math.sin(0.5)).abs().max() < 1e-6
    Rotation(8, 2, 0)(streams[:, :, :2], torch.sin).sum().backward()
    with pytest.raises(ValueError, match=r"mix must return \[2, 3, 4, 4\], not \[2, 3, 2, 2\]"):
        Rotation(8, 4, 0)(streams, torch.sin)
