"""The diversity of a model's residual streams, and how doubly stochastic their mixing is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_lightning.callbacks.doubly_stochastic import sum_residuals
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.callbacks.watching.lineage import streams_in_arguments
from mhc_lightning.callbacks.watching.observations import Observation
from mhc_lightning.callbacks.watching.stream_watcher import Extract
from mhc_lightning.kernels import StreamMappings

ExtractStreams = Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]
"""From (module, arguments, output) of one module call to the streams [..., n, C] it read."""


def relative_diversity(streams: Tensor) -> Tensor:
    """The distance of streams from their mean, relative to their size; averaged over tokens.

    Per token, with the mean stream x̄ = (1/n) Σ_i x_i:
    d = sqrt( Σ_i ‖x_i − x̄‖² / Σ_i ‖x_i‖² ), between 0 (all streams equal) and 1 (they cancel);
    independent random streams have sqrt(1 − 1/n). A token whose streams are all zero counts as 0.

    Args:
        streams: [..., n, C].

    Returns:
        A scalar tensor in at least float32.
    """
    x = streams.to(torch.promote_types(streams.dtype, torch.float32))
    tiny = torch.finfo(x.dtype).tiny
    # Squares of very large or small values leave the range; values relative to the largest do not.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    total = x.sum(-2, keepdim=True)
    spread = torch.sub(x, total, alpha=1 / x.shape[-2])  # x − x̄ in one pass
    norms = [torch.linalg.vector_norm(v.flatten(-2), dim=-1) for v in (spread, x)]
    return (norms[0] / norms[1].clamp_min(tiny)).mean()


class StreamDiversity(StreamSampler[dict[str, Tensor]]):
    """Logs the diversity of the streams that enter each sub-layer, and the Sinkhorn residual.

    Diversity is, per token, d = sqrt( Σ_i ‖x_i − x̄‖² / Σ_i ‖x_i‖² ) with x̄ the mean stream,
    averaged over the tokens of the sampled micro-batch. It is 0 where all streams are equal: n
    streams then do no more than one. The Sinkhorn residual is the largest |row sum − 1| and
    |column sum − 1| of the residual matrices over all tokens, in float32. It is the distance from
    doubly stochastic that finitely many iterations leave (for an unconstrained connection, the
    distance itself).

    Tags: `stream_diversity/{mean,min}`, `stream_diversity/layer_<k>` (k from 0 in the order of the
    calls), `sinkhorn_residual/{row,column}` (the largest over sub-layers) and
    `sinkhorn_residual/{row,column}/layer_<k>`. If there are other sub-layers, mean and min leave
    out the first one of every forward pass, whose streams are copies of one embedding.

    Args:
        every_n_steps: Optimizer steps between samples; None takes the trainer's
            `log_every_n_steps`.
        extract: `(module, args, output) -> StreamMappings | None` for foreign modules.
        extract_streams: `(module, args, output) -> Tensor | None`, the streams [..., n, C] that
            entered that module; None takes the first argument of that shape. Where there is none,
            that sub-layer has no diversity.

    Raises:
        UserError: The interval is not a positive integer.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
        extract_streams: ExtractStreams | None = None,
    ) -> None:
        super().__init__(every_n_steps, extract)
        self.extract_streams = extract_streams

    def note(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, mappings: StreamMappings
    ) -> Tensor | None:
        """The diversity of the streams of one call; they are too large to keep."""
        if self.extract_streams is None:
            streams = streams_in_arguments(mappings, args)
        else:
            streams = self.extract_streams(module, args, output)
        return None if streams is None else relative_diversity(streams)

    def reduce(self, observations: list[Observation]) -> dict[str, Tensor]:
        """The numbers by tag."""
        values: dict[str, Tensor] = {}
        measured = [o for o in observations if o.note is not None]
        if measured:
            later = [o.note for o in measured if o.after is not None]
            later = later or [o.note for o in measured]
            values["stream_diversity/mean"] = torch.stack(later).mean()
            values["stream_diversity/min"] = torch.stack(later).amin()
            values.update({f"stream_diversity/layer_{o.layer}": o.note for o in measured})
        sums = torch.stack([sum_residuals(o.mappings.residual) for o in observations])  # [L, 2]
        for side, by_layer in zip(("row", "column"), sums.unbind(1), strict=True):
            values[f"sinkhorn_residual/{side}"] = by_layer.amax()
            for observation, value in zip(observations, by_layer.unbind(), strict=True):
                values[f"sinkhorn_residual/{side}/layer_{observation.layer}"] = value
        return values
