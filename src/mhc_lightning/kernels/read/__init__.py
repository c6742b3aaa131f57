"""A connection's mappings, and its sub-layer's input, from one pass over the streams.

Reading also returns the streams. So the kernel that finishes the streams' gradient adds the
gradient that comes back through the merge, and autograd never adds stream-sized tensors.
"""

from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_iterations, check_shape
from mhc_lightning.kernels.mappings import MappingRule, Mix, StreamMappings
from mhc_lightning.kernels.precision import compute_dtype, full_precision
from mhc_lightning.kernels.read.operator import read_and_keep, read_plain
from mhc_lightning.kernels.transforms import transformable


def stream_mappings(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
    mix: Mix | None = None,
) -> StreamMappings:
    """Compute one connection's mappings for every token (arXiv 2512.24880, eqs. 7–9 and 14–19).

    The n streams of a token are normalised together, `x / sqrt(mean(x²) + eps)`, projected by
    `phi`, scaled by `alpha`, shifted by `bias` (order: pre | post | residual, row-major), and
    passed through σ, 2σ and Sinkhorn-Knopp. A `mix` takes the place of Sinkhorn-Knopp (in the
    variants of mHC); the last n² coefficients may then be any number m.

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n], or [n·C, 2n + m].
        alpha: [3], the gates of pre, post and residual.
        bias: [n² + 2n], or [2n + m].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        mix: Makes the residual mapping [..., n, n] of logits [..., m] in place of Sinkhorn-Knopp.

    Returns:
        Mappings of leading shape `streams.shape[:-2]`, float32 (float64 if any operand is).

    Raises:
        ValueError: If the shapes don't fit or `num_iterations` < 1.
    """
    rule = manifold_rule(streams, phi, alpha, bias, num_iterations, eps, mix)
    return _read(streams, phi, alpha, bias, rule, want_read=False, mix=mix)[2]


def read_streams(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
    carry: Tensor | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, StreamMappings]:
    """`stream_mappings` and `aggregate_streams` in one step.

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n], or [n·C, 2n + m] with `mix`.
        alpha: [3].
        bias: [n² + 2n], or [2n + m].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
        carry: Weights [..., n] to aggregate with; by default the mappings' `pre`.
        mix: As in `stream_mappings`.

    Returns:
        The streams [..., n, C] to merge into (the same values; with these, gradients accumulate
        here), the sub-layer's input [..., C], and the mappings.

    Raises:
        ValueError: If the shapes don't fit or `num_iterations` < 1.
    """
    rule = manifold_rule(streams, phi, alpha, bias, num_iterations, eps, mix)
    if carry is not None:
        check_shape("carry", carry, list(streams.shape[:-1]), streams)
    return _read(streams, phi, alpha, bias, rule, want_read=True, carry=carry, mix=mix)


def hyper_mappings(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool = True, eps: float = 1e-20
) -> StreamMappings:
    """Compute the dynamic mappings of Hyper-Connections for every token (arXiv 2409.19606).

    Each stream is normalised by itself and yields its own coefficients: with
    `z[j] = act(streams[j] / rms(streams[j]) · phi)`,
    `pre[j] = alpha[0] · z[j, 0] + b`, `post[j] = alpha[1] · z[j, 1] + b` and
    `residual[i, j] = alpha[0] · z[j, 2 + i] + b` (eq. 5 of arXiv 2512.24880).

    Args:
        streams: [..., n, C].
        phi: [C, n + 2], columns in the order pre | post | residual.
        alpha: [2]: the scale of pre and residual, and the scale of post.
        bias: The static mappings [n² + 2n] in the order pre | post | residual (row-major).
        tanh: True if `act` is tanh, False if it is the identity.
        eps: Added to the mean square, inside the square root.

    Returns:
        Mappings of leading shape `streams.shape[:-2]`, float32 (float64 if any operand is).

    Raises:
        ValueError: If the shapes don't fit.
    """
    rule = _hyper_rule(streams, phi, alpha, bias, tanh, eps)
    return _read(streams, phi, alpha, bias, rule, want_read=False)[2]


def read_hyper_streams(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool = True, eps: float = 1e-20
) -> tuple[Tensor, Tensor, StreamMappings]:
    """`hyper_mappings` and `aggregate_streams` in one step; returns what `read_streams` does.

    Args:
        streams: [..., n, C].
        phi: [C, n + 2].
        alpha: [2].
        bias: [n² + 2n].
        tanh: True if the dynamic part is bounded by tanh.
        eps: Added to the mean square, inside the square root.

    Raises:
        ValueError: If the shapes don't fit.
    """
    rule = _hyper_rule(streams, phi, alpha, bias, tanh, eps)
    return _read(streams, phi, alpha, bias, rule, want_read=True)


def manifold_rule(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int,
    eps: float,
    mix: Mix | None,
) -> MappingRule:
    """The rule of mHC or of its variants, after a check of the operands' shapes."""
    n, width = streams.shape[-2:]
    count = n * n + 2 * n if mix is None else max(2 * n, phi.shape[-1])
    check_shape("phi", phi, [n * width, count], streams)
    check_shape("alpha", alpha, [3], streams)
    check_shape("bias", bias, [count], streams)
    check_iterations(num_iterations)
    return MappingRule("sinkhorn" if mix is None else "gates", num_iterations, eps)


def _hyper_rule(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool, eps: float
) -> MappingRule:
    n, width = streams.shape[-2:]
    check_shape("phi", phi, [width, n + 2], streams)
    check_shape("alpha", alpha, [2], streams)
    check_shape("bias", bias, [n * n + 2 * n], streams)
    return MappingRule("tanh" if tanh else "linear", 1, eps)


def _read(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    rule: MappingRule,
    want_read: bool,
    carry: Tensor | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, StreamMappings]:
    *leading, n, width = streams.shape
    dtype = compute_dtype(streams, phi, alpha, bias)
    run = transformable(read_and_keep, read_plain)
    with full_precision(streams):
        kept, read, pre, post, residual = run(
            streams,
            *(parameter.to(dtype).contiguous() for parameter in (phi, alpha, bias)),
            None if carry is None else carry.reshape(-1, n).to(dtype),
            *rule,
            want_read,
        )
        mappings = mappings_by_token(leading, pre, post, residual, mix)
    if want_read:
        read = read.reshape(*leading, width)
    return kept, read, mappings


def mappings_by_token(
    leading: list[int], pre: Tensor, post: Tensor, residual: Tensor, mix: Mix | None
) -> StreamMappings:
    """Give the mappings of T tokens their shape; with `mix`, `residual` are logits [T, m]."""
    n = pre.shape[1]
    if mix is None:
        residual = residual.reshape(*leading, n, n)
    else:
        residual = mix(residual.reshape(*leading, residual.shape[1]))
        if list(residual.shape) != [*leading, n, n]:
            raise ValueError(f"mix must return {[*leading, n, n]}, not {list(residual.shape)}")
    return StreamMappings(pre.reshape(*leading, n), post.reshape(*leading, n), residual)
