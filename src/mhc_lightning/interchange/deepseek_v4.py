"""mHC connections converted to the layout of DeepSeek-V4, and back.

For each connection V4 stores three float32 tensors: `fn` [n² + 2n, n·C], `base` [n² + 2n] and
`scale` [3], in the order pre, post, comb. They are `phi` transposed, `bias` and `alpha`, with one
difference: `comb[j, k]` is the weight of stream j in the new stream k. So `comb` is the transpose
of our residual matrix, and its n² coefficients are permuted accordingly.

V4 has two epsilons. `norm_eps` (1e-6) stands inside the root of the RMS, like `eps` of a
connection: configure a model for V4's weights with `connection.eps=1e-6`.
`hc_eps` (1e-6) is added to the pre mapping and, within the Sinkhorn iterations, to entries and to
sums; this package has no such epsilon. For coefficients of a few units, `hc_eps` changes the
mappings by less than 1e-4 (by 2e-3 for coefficients around 8, where it enlarges tiny entries). With
`hc_eps=0` in the V4 model, the mappings are equal.

V4 reads out its streams by a separate mapping (`hc_head`), this package by their mean. On export
the mean becomes a head of equal constant weights. On import any other head is refused.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.interchange.compatibility import check_tensors, is_weight
from mhc_lightning.modules import ManifoldHyperConnection, StreamMappings, Transformer

HC_EPS = 1e-6
NORM_EPS = 1e-6

# Names in DeepSeek's own files, and in the state dict of transformers' DeepseekV4ForCausalLM.
_DEEPSEEK = {"attention": "layers.{}.hc_attn_{}", "feed_forward": "layers.{}.hc_ffn_{}"}
_TRANSFORMERS = {"attention": "layers.{}.attn_hc.{}", "feed_forward": "layers.{}.ffn_hc.{}"}
_TO_DEEPSEEK = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"\.attn_hc\.(fn|base|scale)$"), r".hc_attn_\1"),
    (re.compile(r"\.ffn_hc\.(fn|base|scale)$"), r".hc_ffn_\1"),
    (re.compile(r"^hc_head\.hc_(fn|base|scale)$"), r"hc_head_\1"),
)
_CONNECTION = re.compile(r"^layers\.\d+\.hc_(attn|ffn)_(fn|base|scale)$|^hc_head_(fn|base|scale)$")


@dataclass(frozen=True)
class DeepseekV4Settings:
    """The settings of connections, under their names in V4's configuration.

    Attributes:
        hc_mult: Streams n.
        hc_sinkhorn_iters: Sinkhorn iterations.
        hc_eps: Added to the pre mapping and within the Sinkhorn iterations.
        rms_norm_eps: Inside the root of the RMS.
    """

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = HC_EPS
    rms_norm_eps: float = NORM_EPS


def connection_to_deepseek_v4(connection: ManifoldHyperConnection) -> dict[str, Tensor]:
    """A connection's weights as V4's `fn`, `base` and `scale`, float32 copies."""
    n = connection.num_streams
    rows = connection.phi.detach().t()
    return {
        "fn": _transpose_comb(rows, n).float().contiguous(),
        "base": _transpose_comb(connection.bias.detach(), n).float(),
        "scale": connection.alpha.detach().float().clone(),
    }


def connection_from_deepseek_v4(
    connection: ManifoldHyperConnection, tensors: Mapping[str, Tensor]
) -> None:
    """Copy V4's `fn`, `base` and `scale` into a connection.

    Raises:
        UserError: Names the tensors that are missing, unexpected or of another shape, or one that
            is quantised or not finite.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(shapes, connection_to_deepseek_v4(connection), "the connection")
    _check_values(tensors)
    n = connection.num_streams
    with torch.no_grad():
        connection.phi.copy_(_transpose_comb(tensors["fn"], n).t())
        connection.bias.copy_(_transpose_comb(tensors["base"], n))
        connection.alpha.copy_(tensors["scale"])


def to_deepseek_v4(
    model: Transformer, *, transformers_names: bool = False
) -> tuple[dict[str, Tensor], DeepseekV4Settings]:
    """A network's connections, and the read-out of its streams, in V4's layout.

    Args:
        model: A network with mHC connections.
        transformers_names: True for the tensor names of transformers' V4 model, without the
            leading `model.`; False for those of DeepSeek's own files.

    Returns:
        The tensors by name, and the settings that a V4 model needs with them. `hc_eps` is 0: then
        V4's code computes our mappings.

    Raises:
        UserError: The network has other connections, or several of different settings, or a memory.
    """
    if model.memory.hash is not None:
        raise UserError(
            "DeepSeek-V4's layout has no place for a memory of n-grams, and without it the"
            " connections compute something else; export the model as mhc-lightning's own folder"
        )
    return _in_deepseek_v4(model, transformers_names)


def _in_deepseek_v4(
    model: Transformer, transformers_names: bool = False
) -> tuple[dict[str, Tensor], DeepseekV4Settings]:
    tensors = {}
    names = _TRANSFORMERS if transformers_names else _DEEPSEEK
    connections = _connections(model)
    for (layer, part), connection in connections.items():
        for name, tensor in connection_to_deepseek_v4(connection).items():
            tensors[names[part].format(layer, name)] = tensor
    first = connections[0, "attention"]
    head = "hc_head.hc_{}" if transformers_names else "hc_head_{}"
    tensors |= {head.format(k): v for k, v in _mean_head(first.num_streams, first.dim).items()}
    settings = DeepseekV4Settings(
        first.num_streams, first.sinkhorn_iterations, hc_eps=0.0, rms_norm_eps=first.eps
    )
    return tensors, settings


def from_deepseek_v4(
    model: Transformer,
    tensors: Mapping[str, Tensor],
    settings: DeepseekV4Settings | None = None,
) -> None:
    """Copy the connections' weights of a V4 model into those of a network.

    Args:
        model: A network with mHC connections, as many as the V4 model has.
        tensors: V4's tensors, under DeepSeek's or transformers' names; only those of connections
            and of the head are read.
        settings: The settings of connections in V4's configuration (by default, those of the
            released models).

    Raises:
        UserError: Names tensors that are missing, unexpected or of another shape, one that is
            quantised or not finite, settings that the network's connections do not have, or a head
            that is not the mean of the streams.
    """
    settings = settings or DeepseekV4Settings()
    weights = {}
    for name, tensor in tensors.items():
        if _CONNECTION.match(_deepseek_name(name)):
            weights[_deepseek_name(name)] = tensor
    connections = _connections(model)
    first = connections[0, "attention"]
    expected, own_settings = _in_deepseek_v4(model)
    if not any(name.startswith("hc_head") for name in weights):
        expected = {name: t for name, t in expected.items() if not name.startswith("hc_head")}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check_tensors(shapes, expected, "the DeepSeek-V4 model")
    _check_values(weights)
    for key, own, given in (
        ("sinkhorn_iterations", own_settings.hc_sinkhorn_iters, settings.hc_sinkhorn_iters),
        ("eps", own_settings.rms_norm_eps, settings.rms_norm_eps),
    ):
        if own != given:
            raise UserError(
                f"connection.{key} is {own}, but the DeepSeek-V4 weights were trained with"
                f" {given}; build the model with connection.{key}={given}"
            )
    if "hc_head_fn" in weights:
        head = {name: weights[f"hc_head_{name}"].float() for name in ("fn", "base", "scale")}
        dynamic = bool(head["fn"].any()) and bool(head["scale"].any())
        if dynamic or not torch.equal(head["base"], head["base"][:1].expand(first.num_streams)):
            raise UserError(
                "hc_head_fn, hc_head_base, hc_head_scale weigh the streams, which this model reads"
                " out as their mean; leave them out to take the connections alone"
            )
    for (layer, part), connection in connections.items():
        name = _DEEPSEEK[part]
        own_weights = {key: weights[name.format(layer, key)] for key in ("fn", "base", "scale")}
        connection_from_deepseek_v4(connection, own_weights)


def connections_in(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The connections of a V4 model, in the order of its sub-layers.

    Args:
        names: The names of all its tensors, in DeepSeek's files or in transformers.

    Returns:
        For each connection, by DeepSeek's name (`layers.0.hc_attn`), the names of its tensors `fn`,
        `base` and `scale`, as far as they exist.
    """
    connections: dict[tuple[int, str], dict[str, str]] = {}
    for name in names:
        match = _CONNECTION.match(_deepseek_name(name))
        if match and match.group(1):
            layer = int(match.group(0).split(".")[1])
            connections.setdefault((layer, match.group(1)), {})[match.group(2)] = name
    return {
        f"layers.{layer}.hc_{part}": connections[layer, part] for layer, part in sorted(connections)
    }


def static_mappings(base: Tensor, settings: DeepseekV4Settings) -> StreamMappings:
    """The mappings of a V4 connection from its `base` alone, as V4's code computes them.

    They are the mappings of a token whose streams project to zero.

    Args:
        base: [n² + 2n].
        settings: The Sinkhorn iterations and `hc_eps` are used.

    Returns:
        Float64 mappings [1, n], [1, n], [1, n, n], in the orientation of this package.

    Raises:
        UserError: `base` has another shape.
    """
    n = math.isqrt(base.numel() + 1) - 1
    if base.dim() != 1 or n < 1 or n * n + 2 * n != base.numel():
        raise UserError(f"a connection's base has shape {list(base.shape)}, not [n² + 2n]")
    pre, post, comb = base.double().split([n, n, n * n])
    eps = settings.hc_eps
    mixing = torch.softmax(comb.view(n, n), -1) + eps  # [from, to]
    mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
    for _ in range(settings.hc_sinkhorn_iters - 1):
        mixing = mixing / (mixing.sum(-1, keepdim=True) + eps)
        mixing = mixing / (mixing.sum(-2, keepdim=True) + eps)
    mappings = (torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), mixing.T)
    return StreamMappings(*(mapping.unsqueeze(0) for mapping in mappings))


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose values cannot be copied as weights.

    Raises:
        UserError: A tensor is quantised or not finite.
    """
    for name, tensor in tensors.items():
        if not is_weight(tensor):
            raise UserError(
                f"{name} is {tensor.dtype}: quantised weights are not read; give float32 ones"
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name} of the DeepSeek-V4 model has values that are not finite")


def _deepseek_name(name: str) -> str:
    for pattern, replacement in _TO_DEEPSEEK:
        name = pattern.sub(replacement, name)
    return name


def _transpose_comb(rows: Tensor, n: int) -> Tensor:
    """Transpose the n x n block of the mixing matrix in [n² + 2n, ...]; its own inverse."""
    mappings, mixing = rows.split([2 * n, n * n])
    return torch.cat([mappings, mixing.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)])


def _mean_head(n: int, dim: int) -> dict[str, Tensor]:
    """V4's head for which every stream weighs 1/n (if n is 1, as nearly as a sigmoid can)."""
    logit = -math.log(n - 1) if n > 1 else 20.0
    return {
        "fn": torch.zeros(n, n * dim),
        "base": torch.full((n,), logit),
        "scale": torch.zeros(1),
    }


def _connections(model: Transformer) -> dict[tuple[int, str], ManifoldHyperConnection]:
    """Connections by (block, sub-layer).

    Raises:
        UserError: A connection is not an mHC connection, or its settings differ from the others.
    """
    connections = {}
    for layer, block in enumerate(model.blocks):
        for part in ("attention", "feed_forward"):
            connections[layer, part] = getattr(block, f"{part}_connection")
    settings = set()
    for (layer, part), connection in connections.items():
        if not isinstance(connection, ManifoldHyperConnection):
            raise UserError(
                f"DeepSeek-V4's layout is for connection=mhc; blocks.{layer}.{part}_connection is"
                f" {type(connection).__name__}"
            )
        settings.add((connection.sinkhorn_iterations, connection.eps))
    if len(settings) > 1:
        raise UserError(f"the connections have different (sinkhorn_iterations, eps): {settings}")
    return connections
