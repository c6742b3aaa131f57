"""Redoing a stretch of stream operations with mappings that are known: no projection, no Sinkhorn.

Recomputation calls `replay_streams` in backward, where nothing needs its gradient. So it is not
registered as an operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_shape
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.mappings import StreamMappings
from mhc_lightning.kernels.precision import compute_dtype, full_precision


@torch.no_grad()
def replay_streams(
    entry: Tensor,
    outputs: Sequence[Tensor],
    mappings: Sequence[StreamMappings],
    want_streams: Sequence[bool],
    want_reads: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Rebuild the streams and inputs of consecutive sub-layers from the streams of the first.

    `streams[k + 1] = residual[k] · streams[k] + post[k] · outputs[k]` and
    `reads[k] = pre[k] · streams[k]`, rounded at the same places as in the operators.

    Args:
        entry: Streams [..., n, C] of the first sub-layer.
        outputs: Results of all sub-layers but the last, each [..., C].
        mappings: One record per sub-layer; the last one's `post` and `residual` are not used.
        want_streams: By sub-layer, True if its streams are wanted; False for the first.
        want_reads: By sub-layer, True if its input is wanted.

    Returns:
        Streams [..., n, C] and inputs [..., C] by sub-layer, contiguous, None where not wanted.

    Raises:
        ValueError: If the shapes don't fit.
    """
    *leading, n, width = entry.shape
    for output in outputs:
        check_shape("output", output, [*leading, width], entry)
    for pre, post, residual in mappings:
        check_shape("pre", pre, [*leading, n], entry)
        check_shape("post", post, [*leading, n], entry)
        check_shape("residual", residual, [*leading, n, n], entry)
    dtype = compute_dtype(entry, *(m for record in mappings for m in record))
    flat = [
        StreamMappings(
            pre.reshape(-1, n).to(dtype),
            post.reshape(-1, n).to(dtype),
            residual.reshape(-1, n, n).to(dtype),
        )
        for pre, post, residual in mappings
    ]
    with full_precision(entry):
        streams, reads = implementation("replay", entry, flat[0].residual).replay_forward(
            entry.reshape(-1, n, width),
            [output.reshape(-1, width) for output in outputs],
            flat,
            want_streams,
            want_reads,
        )
    return (
        [None if x is None else x.view(entry.shape) for x in streams],
        [None if u is None else u.view(*leading, width) for u in reads],
    )
