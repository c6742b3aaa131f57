"""Other implementations of one mHC connection, behind the interface of ours.

Each is imported when it is built, and those that cannot be are left out by `importable_peers`.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

SubLayer = Callable[[Tensor], Tensor]


class PlainConnection(nn.Module):
    """Equations 7 to 9 and 14 to 19 as one writes them first: autograd does the rest."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        n = num_streams
        self.phi = nn.Parameter(torch.randn(n * dim, n * n + 2 * n) * 0.02)
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        self.bias = nn.Parameter(torch.zeros(n * n + 2 * n))

    def forward(self, streams: Tensor, sublayer: SubLayer) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        n = streams.shape[-2]
        flat = streams.float().flatten(-2)
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-20)
        parts = (normed @ self.phi).split([n, n, n * n], -1)
        pre, post, residual = (
            part * gate + bias
            for part, gate, bias in zip(
                parts, self.alpha, self.bias.split([n, n, n * n]), strict=True
            )
        )
        matrix = residual.unflatten(-1, (n, n)).exp()
        for _ in range(20):
            matrix = matrix / matrix.sum(-2, keepdim=True)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        read = torch.einsum("...i,...ic->...c", pre.sigmoid(), streams.float())
        output = sublayer(read.to(streams.dtype)).float()
        mixed = torch.einsum("...ij,...jc->...ic", matrix, streams.float())
        return (mixed + 2 * post.sigmoid()[..., None] * output[..., None, :]).to(streams.dtype)


class TransformersConnection(nn.Module):
    """transformers' ``DeepseekV4HyperConnection``: reads and merges as its decoder layer does."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        package = "transformers.models.deepseek_v4"
        config = importlib.import_module(f"{package}.configuration_deepseek_v4").DeepseekV4Config(
            hidden_size=dim, hc_mult=num_streams
        )
        modeling = importlib.import_module(f"{package}.modeling_deepseek_v4")
        self.mix = modeling.DeepseekV4HyperConnection(config)
        nn.init.normal_(self.mix.fn, std=0.02)
        nn.init.zeros_(self.mix.base)
        nn.init.ones_(self.mix.scale)

    def forward(self, streams: Tensor, sublayer: SubLayer) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        post, comb, collapsed = self.mix(streams)
        output = sublayer(collapsed)
        mixed = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
        return post.to(streams.dtype).unsqueeze(-1) * output.unsqueeze(-2) + mixed


class HyperConnectionsV2(nn.Module):
    """mHCv2 of ``hyper-connections``: other mathematics, it projects each stream by itself."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        v2 = importlib.import_module("hyper_connections.mHCv2")
        self.wrapped = v2.ManifoldConstrainedHyperConnections(num_streams, dim=dim, layer_index=0)

    def forward(self, streams: Tensor, sublayer: SubLayer) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        u, add_residual = self.wrapped(streams)
        return add_residual(sublayer(u))


class LigerConnection(nn.Module):
    """Liger's kernels, put together as its ``LigerMHC`` does; phi is bfloat16, as it advises."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        n = num_streams
        self.functional = importlib.import_module("liger_kernel.transformers.functional")
        phi = torch.randn(n * dim, n * n + 2 * n) * 0.02
        self.phi = nn.Parameter(phi.bfloat16())
        self.bias = nn.Parameter(torch.zeros(n * n + 2 * n))
        self.alphas = nn.ParameterList(torch.ones(()) for _ in range(3))

    def mappings(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre, post and residual."""
        return self.functional.liger_mhc_coeffs(
            streams, self.phi, self.bias, *self.alphas, allow_fp32=streams.dtype == torch.float32
        )

    def forward(self, streams: Tensor, sublayer: SubLayer) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        pre, post, residual = self.mappings(streams)
        output = sublayer(self.functional.liger_mhc_pre(streams, pre).to(streams.dtype))
        return self.functional.liger_mhc_post_res(streams, output, post, residual)


PEERS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "liger": ("liger_kernel.transformers.functional", LigerConnection),
    "transformers": (
        "transformers.models.deepseek_v4.modeling_deepseek_v4",
        TransformersConnection,
    ),
    "hyper_connections_mhcv2": ("hyper_connections.mHCv2", HyperConnectionsV2),
}


def importable_peers() -> dict[str, Callable[[int, int], nn.Module]]:
    """By name, what builds a connection of (C, n) with each package that is installed here."""
    found = {}
    for name, (module, build) in PEERS.items():
        try:
            importlib.import_module(module)
        except Exception:  # a package may fail to load in any way; then it is no peer here
            continue
        found[name] = build
    return found
